# SPDX-License-Identifier: Apache-2.0
"""Optuna (an extra): shares the runs of a sweep among processes, or searches their settings."""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from particlejax.core.errors import UserError, install_line

_HEARTBEAT_SECONDS = (
    60  # seconds between heartbeats; a run without one for twice as long is reassigned
)
_LISTING_TIMEOUT = 60  # seconds to wait for the process that creates the study
_RUNS = "runs"


def run_each(storage: str, name: str, labels: Sequence[str], run: Callable[[int], Any]) -> None:
    """Calls work(i) for labels that no other process has taken, until none is left.

    Runs are queued in the storage as trials, and taking one is atomic, so each is taken once.
    (Optuna's grid sampler repeats a running one once all have begun.) An interrupted run is queued
    again. A run of a dead process is taken again if the storage is a database with heartbeats. A
    journal has none: there, run the same sweep without a storage to finish.
    """
    optuna = _optuna()
    study = _open_study(optuna, _storage(optuna, storage), name, labels)

    def objective(trial: Any) -> float:
        if "fixed_params" not in study.get_trials(deepcopy=False)[trial.number].system_attrs:
            raise optuna.TrialPruned  # another process took the last one
        label = trial.suggest_categorical("run", list(labels))
        try:
            run(labels.index(label))
        except BaseException:
            study.enqueue_trial({"run": label})
            raise
        return 0.0

    while _has_waiting(optuna, study):
        study.optimize(objective, n_trials=1)


def search(
    storage: str,
    name: str,
    trials: int,
    seed: int,
    space: Mapping[str, Sequence[Any]],
    measure: Callable[[dict[str, Any], int], float],
) -> dict[int, dict[str, Any]]:
    """TPE over `space` (paths to their values) that maximizes `measure(choice, trial number)`.

    Returns the choice of every finished trial of any process, by trial number.
    """
    optuna = _optuna()
    study = optuna.create_study(
        storage=_storage(optuna, storage),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed % 2**32),
    )

    def objective(trial: Any) -> float:
        for key, values in space.items():
            trial.suggest_categorical(key, [json.dumps(option) for option in values])
        try:
            return measure(_settings_of(trial), trial.number)
        except UserError as error:  # incompatible settings
            raise optuna.TrialPruned(str(error)) from error

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if len(study.get_trials(states=states)) < trials:
        study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, states=states)])
    return {trial.number: _settings_of(trial) for trial in study.get_trials(states=states)}


def _settings_of(trial: Any) -> dict[str, Any]:
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


def _storage(optuna: Any, location: str) -> Any:
    """A database for a URL, else a journal file, which also works on a network file system.

    Both take runs atomically; Optuna with SQLite may give one run to two processes.
    """
    if location.startswith("sqlite"):
        raise UserError(
            f"config.sweep.storage={location!r}: SQLite may give one run to two processes: use a "
            "plain file, or a database such as mysql://... or postgresql://..."
        )
    with warnings.catch_warnings(action="ignore"):  # ExperimentalWarning
        if "://" not in location:
            backend = optuna.storages.journal.JournalFileBackend(location)
            return optuna.storages.JournalStorage(backend)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
        return optuna.storages.RDBStorage(
            location, heartbeat_interval=_HEARTBEAT_SECONDS, heartbeat_stale_trial_callback=retry
        )


def _open_study(optuna: Any, storage: Any, name: str, labels: Sequence[str]) -> Any:
    """The study, with every label queued once by the process that created it."""
    try:
        study = optuna.create_study(storage=storage, study_name=name)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        deadline = time.monotonic() + _LISTING_TIMEOUT
        while _RUNS not in study.user_attrs:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the process that began the sweep {name} stopped before it listed the runs: "
                    "set another config.sweep.storage."
                ) from None
            time.sleep(0.2)
        if study.user_attrs[_RUNS] != list(labels):
            raise UserError(
                f"config.sweep.storage holds another sweep of {name}: set another one."
            ) from None
        return study
    for label in labels:
        study.enqueue_trial({"run": label})
    study.set_user_attr(_RUNS, list(labels))
    return study


def _has_waiting(optuna: Any, study: Any) -> bool:
    with warnings.catch_warnings(action="ignore"):
        optuna.storages.fail_stale_trials(study)
    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))
