# SPDX-License-Identifier: Apache-2.0
"""Optuna (an extra) hands out the runs of a sweep to whoever asks, or searches the settings that
they differ in.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from particlejax.core.errors import UserError, install_line

_BEAT = 60  # seconds between signs of life; a run without any for twice as long is given to another
_LISTED = 60  # seconds that the process which begins a study may take to list its runs
_RUNS = "runs"


def each(storage: str, name: str, labels: Sequence[str], work: Callable[[int], Any]) -> None:
    """Calls work(i) for labels that no other process has taken, until none is left.

    Runs wait in the storage as trials and are taken one at a time; taking is atomic there, so each
    is taken once. (Optuna's grid sampler hands out a run that another process is still at once all
    have begun.) One that was interrupted is put back; one whose process died is taken again where a
    database sees its signs of life stop. A journal does not: there the same sweep without a storage
    does what is left.
    """
    optuna = _optuna()
    study = _listed(optuna, _storage(optuna, storage), name, labels)

    def objective(trial: Any) -> float:
        if "fixed_params" not in study.get_trials(deepcopy=False)[trial.number].system_attrs:
            raise optuna.TrialPruned  # another process took the last one meanwhile
        label = trial.suggest_categorical("run", list(labels))
        try:
            work(labels.index(label))
        except BaseException:
            study.enqueue_trial({"run": label})
            raise
        return 0.0

    while _left(optuna, study):
        study.optimize(objective, n_trials=1)


def search(
    storage: str,
    name: str,
    trials: int,
    seed: int,
    space: Mapping[str, Sequence[Any]],
    measure: Callable[[dict[str, Any], int], float],
) -> dict[int, dict[str, Any]]:
    """TPE over `space`, path names to the values they may have; `measure` of a choice and the
    trial's number is maximised.

    What was chosen in each trial that is over, whoever ran it and whenever, by its number.
    """
    optuna = _optuna()
    study = optuna.create_study(
        storage=_storage(optuna, storage),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
    )

    def objective(trial: Any) -> float:
        for key, values in space.items():
            trial.suggest_categorical(key, [json.dumps(v) for v in values])
        try:
            return measure(_chosen(trial), trial.number)
        except UserError as error:  # settings that do not go together
            raise optuna.TrialPruned(str(error)) from error

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if len(study.get_trials(states=states)) < trials:
        study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, states=states)])
    return {trial.number: _chosen(trial) for trial in study.get_trials(states=states)}


def _chosen(trial: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in trial.params.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "config.sweep.storage and num_trials need Optuna: "
            f"run `{install_line('optuna')}`, or leave them unset."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(optuna: Any, place: str) -> Any:
    """A database behind its URL, else a journal in a file, which a network's file system may hold
    too.

    Taking a run must be atomic, which it is in both; Optuna's use of SQLite lets two processes take
    one.
    """
    if place.startswith("sqlite"):
        raise UserError(
            f"config.sweep.storage={place!r}: SQLite would give a run to two processes, so name a "
            "plain file, or a "
            "database as mysql://... or postgresql://..."
        )
    with warnings.catch_warnings(action="ignore"):  # marked experimental, as it has been for years
        if "://" not in place:
            backend = optuna.storages.journal.JournalFileBackend(place)
            return optuna.storages.JournalStorage(backend)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
        return optuna.storages.RDBStorage(
            place, heartbeat_interval=_BEAT, heartbeat_stale_trial_callback=retry
        )


def _listed(optuna: Any, storage: Any, name: str, labels: Sequence[str]) -> Any:
    """The study in which every label waits once, whoever made it."""
    try:
        study = optuna.create_study(storage=storage, study_name=name)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        until = time.monotonic() + _LISTED
        while _RUNS not in study.user_attrs:
            if time.monotonic() > until:
                raise UserError(
                    f"the process that began the sweep {name} stopped before it had listed the "
                    "runs: name another "
                    "config.sweep.storage."
                ) from None
            time.sleep(0.2)
        if study.user_attrs[_RUNS] != list(labels):
            raise UserError(
                f"config.sweep.storage holds another sweep of {name}: name another one."
            ) from None
        return study
    for label in labels:
        study.enqueue_trial({"run": label})
    study.set_user_attr(_RUNS, list(labels))
    return study


def _left(optuna: Any, study: Any) -> bool:
    with warnings.catch_warnings(action="ignore"):
        optuna.storages.fail_stale_trials(study)
    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))
