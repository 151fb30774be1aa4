# SPDX-License-Identifier: Apache-2.0
"""Runs of format 1, trained by commit 415d98b, before keys and parameters were renamed. The code
of today evaluates and continues them with the same numbers.

fixtures/old_runs.tar.xz holds RUN/config.json, RUN/checkpoints and RUN/expected/QUESTION: the
config of a job in the old keys (job.json) and what that code wrote. parameters.txt has a line for
each parameter of a trained stage: path, type, shape, SHA-256. In the environment of made_with.json
numbers are equal to the last bit. Elsewhere they are close, and parameters that are only read are
equal.
"""

import csv
import hashlib
import json
import math
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import av
import jax
import numpy as np
import pytest

from particlejax import main
from particlejax.config import jobs, renames
from particlejax.config.experiment import Experiment, MeshSpec
from particlejax.config.fields import as_dict
from particlejax.core import tree
from particlejax.core.errors import UserError
from particlejax.data.modalities import feature_reader
from particlejax.distributed import sharding
from particlejax.jobs import config_files
from particlejax.reports import markdown, visualize
from particlejax.train import run_dir, stage

ARCHIVE = Path(__file__).parent / "fixtures" / "old_runs.tar.xz"
TOLERANCE = 2e-3  # absolute and relative, in other environments
_SECTIONS = renames.JOBS | {"ingredients": "members", "bad": "unreadable"}  # of results.json
_TIMES = re.compile(
    r"(seconds\w*|(wall|train)_seconds|clips_per_second|data_wait_\w+|mfu|compilations)$"
)
# Features are found by the encoded bytes of a clip, and those of `heard` are of random weights.
_NEEDS_SAME = {("features", "heard"), ("kept", "evaluate")}


def _questions() -> list[tuple[str, str]]:
    with tarfile.open(ARCHIVE) as archive:
        paths = [Path(name).parts[1:] for name in archive.getnames()]
    return sorted((path[0], path[2]) for path in paths if len(path) == 3 and path[1] == "expected")


@pytest.fixture(scope="module")
def old_runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Iterator[Path]:
    """The stored runs with the data that they read, as the current directory."""
    root = tmp_path_factory.mktemp("copy") / "old_runs"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root.parent, filter="data")
    (root / "cache").symlink_to(cache_dir)
    _write_films(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def same_environment(old_runs: Path) -> bool:
    """Whether the packages and the processor are those of the stored numbers."""
    made_with = json.loads((old_runs / "made_with.json").read_text())
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|model)\s*: (.*)$", text, re.MULTILINE))
    return made_with["processor"] == found and all(
        version(name) == number for name, number in made_with["packages"].items()
    )


def _write_films(root: Path) -> None:
    """Raw videos with a series, labels and captions; lists of clips and of class names."""
    folder = root / "films"
    folder.mkdir()
    rows = []
    for i in range(16):
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 60, (20, 16, 16, 3)).astype(np.uint8)
        height = np.clip(8 + 6 * np.sin(np.arange(20) / 3 + i), 0, 15).astype(int)
        for frame, top in zip(frames, height, strict=True):
            frame[top : top + 3, :, i % 3] += 150
        with av.open(str(folder / f"{i}.nut"), "w", format="nut") as container:
            stream = container.add_stream("rawvideo", rate=10)
            stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        lines = [f"{t / 10:.1f},{h / 8 - 1:.3f},{int(h > 8)}\n" for t, h in enumerate(height)]
        (folder / f"{i}.csv").write_text("time,height,up\n" + "".join(lines))
        split, colors = "train" if i < 8 else "val", "|".join(["red", "green", "blue"][: i % 3 + 1])
        rows.append(f"{i}.nut,{split},{colors},{height.mean():.2f},bar {i % 3} at {height[0]}\n")
    (folder / "clips.csv").write_text("path,split,several,height,caption\n" + "".join(rows))
    (root / "listed.csv").write_text("path\n" + "".join(f"train/{i:05d}\n" for i in range(32)))
    (root / "labels.txt").write_text("".join(f"action {i}\n" for i in range(10)))


def _run(config: Mapping[str, Any], workdir: Path) -> None:
    """Runs a job of format 1, without pictures."""
    job = jobs.parse_job(jobs.upgraded(config))
    if isinstance(job, Experiment):
        job = stage.inherit_settings(job)
    with mock.patch.object(visualize, "draw_reconstructions"), mock.patch.object(markdown, "write"):
        main._function(job.job)(job, run_dir.enter(workdir, job), workdir.name)


def _parameters(run: str) -> list[str]:
    """The lines of parameters.txt of RUN_DIR or RUN_DIR:STAGE."""
    _, params = stage.load_trained(run, sharding.make_mesh(MeshSpec()), {})
    lines = []
    for path, leaf in tree.flatten(jax.device_get(params)).items():
        digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:32]
        lines.append(f"{path} {leaf.dtype} {'x'.join(map(str, leaf.shape)) or 1} {digest}")
    return sorted(lines)


def _renamed(lines: str) -> list[str]:
    return sorted(map(renames.parameter, lines.splitlines()))


def _today(value: Any) -> Any:
    """Results of then under today's names, without times."""
    if not isinstance(value, dict):
        return value
    return {
        renames.figure(_SECTIONS.get(name, name)): _today(inner)
        for name, inner in value.items()
        if not _TIMES.search(name)
    }


def _without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_times(inner) for key, inner in value.items() if not _TIMES.search(key)}


def _differences(expected: Any, found: Any, same: bool, where: str = "") -> list[str]:
    """Values that differ: at all if `same`, else numbers by more than the tolerance. Figures that
    came later are no difference.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() <= found.keys():
        if found.get("support") == 0:  # recall and F1 of a class without clips were 0
            expected = expected | {"recall": None, "f1": None}
        pairs = [(key, expected[key], found[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(i, *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    elif expected == found or not same and _close(expected, found):
        return []
    else:
        return [f"{where}: {expected!r} is {found!r}"]
    return [text for key, a, b in pairs for text in _differences(a, b, same, f"{where}/{key}")]


def _close(expected: Any, found: Any) -> bool:
    try:
        numbers = float(expected), float(found)
    except (TypeError, ValueError):
        return False
    return math.isclose(*numbers, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


@pytest.mark.parametrize(("name", "question"), _questions())
def test_an_old_run_gives_what_it_gave(
    name: str, question: str, old_runs: Path, same_environment: bool, tmp_path: Path
) -> None:
    expected = old_runs / name / "expected" / question
    texts = {path.name: path.read_text() for path in expected.iterdir()}
    if question.startswith("parameters"):
        _, _, trained = question.partition("_")
        found = _parameters(f"{name}:{trained}" if trained else name)
        assert found == _renamed(texts["parameters.txt"])
        return
    if not same_environment and (name, question) in _NEEDS_SAME:
        pytest.skip("the installed packages write other clips or draw other weights")
    config = json.loads(texts.pop("job.json", "{}"))
    workdir = tmp_path / "run"
    if name == "features":  # in its folder, where the results of then stand
        workdir = old_runs / name / question
        shutil.copy(expected / "results.json", workdir)
    elif question == "continue":
        workdir = old_runs / f"{name}_continued"  # beside its base, where the checkpoint expects it
        shutil.copytree(name, workdir, ignore=shutil.ignore_patterns("expected"))
        config = json.loads((workdir / "config.json").read_text())
    _run(config, workdir)
    for file, text in texts.items():
        if file == "parameters.txt":
            found = _parameters(str(workdir / "model" if (workdir / "model").is_dir() else workdir))
            if question == "start":  # a step at learning rate 0: the encoder is that of the old run
                found = [line for line in found if line.startswith("encoder/")]
            wanted = _renamed(text)
            if question == "continue" and not same_environment:
                found, wanted = (
                    [line.rpartition(" ")[0] for line in lines] for lines in (found, wanted)
                )
            assert found == wanted
            continue
        if file == "results.json":
            found, wanted = json.loads((workdir / file).read_text()), _today(json.loads(text))
            if name == "features":  # the old section stays beside the new one
                assert found.pop("features")["width"] == wanted["extract_features"]["width"]
                if not same_environment:
                    del found["extract_features"]["val[:16]"]["computed"]
                    del wanted["extract_features"]["val[:16]"]["computed"]
            found = _without_times(found)
            if question in ("evaluate", "soup"):
                assert _without_times(stage.read_results(expected)) == wanted
        elif file == "metrics.jsonl":
            found = [json.loads(line) for line in (workdir / file).read_text().splitlines()]
            wanted = [renames.figures(json.loads(line)) for line in text.splitlines()]
        else:
            found, wanted = (
                list(csv.reader(table.splitlines()))
                for table in ((workdir / file).read_text(), text)
            )
        assert not _differences(wanted, found, same_environment, file)


@pytest.mark.parametrize("name", ["seen", "heard", "told"])
def test_the_command_of_old_features_has_todays_names(name: str, old_runs: Path) -> None:
    folder = Path("features", name)
    _, _, _, _, file, *settings = shlex.split(feature_reader.read_description(folder).command)
    config = config_files.load(file)
    config_files.apply_overrides(config, [word.removeprefix("--config.") for word in settings])
    job = json.loads((folder / "config.json").read_text())
    assert config.to_dict() == as_dict(
        jobs.parse_job(jobs.upgraded({**job, "folder": str(folder)}))
    )


def test_converted_values_of_an_old_config(old_runs: Path) -> None:
    classify, series, tuned, lora = map(
        stage.read_experiment, map(Path, ("classify", "series", "tuned", "lora"))
    )
    masked = classify.stages["pretrain"].objectives["masked_autoencoder"]
    assert (masked.mask_ratio, masked.target_ratio, masked.norm_pix_loss) == (0.6, 0.3, False)
    assert classify.stages["pretrain"].val_every_steps > 10**6, "once 0: at the end alone"
    assert classify.stages["finetune"].data["augment"] == {
        "no_flip_classes": ["slide"],
        "hflip_prob": 0.5,
    }
    assert classify.model_of(classify.stages["finetune"]).remat_policy == "full"
    config = json.loads(Path("classify", "config.json").read_text())
    sweep = jobs.parse_job(jobs.upgraded({**config, "job": "sweep"})).sweep
    assert sweep.metric == "finetune/val/top5"
    assert sweep.runs["fast"]["stages"]["finetune"] == {
        "optim": {"learning_rate": 0.01},
        "finetune": {"method": "linear_probe"},
    }
    assert series.model_of(series.stages["regress"]).share_encoder is False
    assert lora.stages["finetune"].best_metric == "classify/exact_match"
    methods = {name: spec.finetune for name, spec in tuned.stages.items()}
    assert (methods["prompt"].method, methods["prompt"].num_virtual_tokens) == ("vpt_shallow", 2)
    assert (methods["adapter"].method, methods["adapter"].adapter_dim) == ("adapter", 3)
    assert methods["probe"].method == "attentive_probe"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"order": ("a",)}, r"config\.order is now config\.stage_order\.$"),
        ({"data": {"still": 0.3}}, r"config\.data\.still is now config\.data\.temporal_mean_scale"),
        ({"job": "predict", "video": "a.mp4"}, r"config\.video is now config\.videos\.$"),
        ({"job": "recognise"}, r"config\.job: 'recognise' is now 'predict'\.$"),
        ({"particles": {"policy": "runs"}}, "policy: 'runs' is now 'run_length'"),
        ({"data": {"modalities": ("vision", "series")}}, "'series' is now 'timeseries'"),
        ({"stages": {"a": {"objectives": {"masked": {}}}}}, r"is now .*\.masked_autoencoder\.$"),
        (
            {"stages": {"a": {"objectives": {"jepa": {"keep": 0.4}}}}},
            r"jepa\.keep is now .*\.jepa\.mask_ratio, which is 1 minus the old value\.$",
        ),
    ],
)
def test_an_old_key_or_value_is_answered_with_its_new_name(config: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        jobs.parse_job(config)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stages.finetune.optim.rate", "stages.finetune.optim.learning_rate"),
        ("stages.finetune.tune.how", "stages.finetune.finetune.method"),
        (
            "stages.pretrain.objectives.masked.keep",
            "stages.pretrain.objectives.masked_autoencoder.mask_ratio",
        ),
    ],
)
def test_an_old_key_of_the_command_line_is_answered_with_its_new_path(old: str, new: str) -> None:
    config = config_files.load("experiments/quickstart.py:tiny")
    with pytest.raises(UserError, match=rf"^config\.{re.escape(old)} is now config\.{new}\.$"):
        config_files.apply_overrides(config, [f"{old}=1"])


@pytest.mark.parametrize("name", ["experiments/pretrain/lips.py", "pretrain/lips"])
def test_an_old_experiment_file_is_answered_with_the_new_one(name: str) -> None:
    with pytest.raises(UserError, match="it is now (experiments/)?pretrain/lip_sync"):
        config_files.load(name)


def test_every_old_name_has_a_new_one_that_exists() -> None:
    specs = set().union(*(_specs(job.spec) for job in jobs.JOBS.values()))
    for name, keys in renames.KEYS.items():
        fields = {
            field
            for spec in specs
            if any(base.__name__ == name for base in spec.__mro__)
            for field in spec.__dataclass_fields__
        }
        assert fields, f"{name} is no section of any config"
        assert set(keys.values()) <= fields, name
        assert not set(keys) & fields, f"{name} has an old name among its own"
    assert set(renames.JOBS.values()) <= jobs.JOBS.keys()
    root = Path(__file__).parents[1]
    assert all((root / file).is_file() for file in renames.FILES.values())


def test_every_new_value_may_be_written() -> None:
    for spec in set().union(*(_specs(job.spec) for job in jobs.JOBS.values())):
        for field in spec.__dataclass_fields__.values():
            table, names = renames.values_of(spec, field.name), field.metadata.get("names", ())
            if names and table not in (renames.JOBS, renames.MODALITIES):
                assert set(table.values()) <= set(names), f"{spec.__name__}.{field.name}"
            assert not set(table) & set(names), f"{spec.__name__}.{field.name} has an old value"


def _specs(spec: type) -> Iterator[type]:
    """A spec and all that stand within it."""
    yield spec
    for field in spec.__dataclass_fields__.values():
        inner = renames.inner_spec(field.type)
        for nested in (*([inner] if inner else []), *field.metadata.get("table", {}).values()):
            yield from _specs(nested)
