# SPDX-License-Identifier: Apache-2.0
"""Help says everything that the specs say, and a wrong name is answered with the right one."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from particlejax import main as entry
from particlejax.config import experiment as specs
from particlejax.config import help as config_help
from particlejax.config import jobs, model, objectives, synonyms, training
from particlejax.config.experiment import Experiment
from particlejax.config.fields import Spec
from particlejax.core.errors import UserError
from particlejax.jobs import config_files

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
    for path in (ROOT / "experiments").rglob("*.py")
)
SPECS = sorted(
    {
        kind
        for module in (specs, model, training, jobs)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec
    },
    key=lambda kind: kind.__name__,
)


def command(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    code = entry.main(["main", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_key_of_every_spec_is_explained(spec: type) -> None:
    assert config_help.docstring(spec)
    meaning = config_help.comments(spec)
    for field in dataclasses.fields(spec):
        explained = meaning.get(field.name) or (
            dataclasses.is_dataclass(field.type) and config_help.docstring(field.type)
        )
        assert explained, f"{spec.__name__}.{field.name} has no comment beside or above it"


def test_the_comment_is_the_one_in_the_source() -> None:
    comments = config_help.comments(objectives.MaskedAutoencoderSpec)
    assert comments["mask_ratio"] == config_help.comments(objectives.MaskSpec)["mask_ratio"], (
        "inherited"
    )
    line = next(
        line
        for line in Path(model.__file__).read_text().splitlines()
        if line.startswith("    rope: ")
    )
    key, _, comment = line.strip().partition("#")
    assert config_help.comments(model.ModelSpec)[key.partition(":")[0]] == comment.strip()


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_lists_every_experiment(capsys: pytest.CaptureFixture, args: tuple[str, ...]) -> None:
    code, out, err = command(capsys, *args)
    assert code == 0 and not err
    for name in EXPERIMENTS:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name


def test_a_wrong_name_lists_the_experiments_too(capsys: pytest.CaptureFixture) -> None:
    code, out, err = command(capsys, "--config", "quikstart")
    assert code == 2 and not out
    assert all(f"  {name} " in err for name in EXPERIMENTS)
    assert err.endswith(
        "particlejax: there is no experiment 'quikstart': did you mean quickstart?\n"
    )


def test_plain_help_is_quick_and_imports_no_jax(tmp_path: Path) -> None:
    """Also elsewhere than in the checkout, whose experiments are then listed."""
    code = (
        "import sys; from particlejax import main; code = main.main(['main', *sys.argv[1:]]);"
        "heavy = {'jax', 'flax', 'numpy', 'tensorflow', 'torch'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for args in (["--help"], ["--config", "pretrain/mae:tiny", "--help"]):
        took = []
        for _ in range(3):  # other processes may be busy
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code, *args],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
            )
            took.append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
            assert "pretrain/mae" in done.stdout
        assert min(took) < 20, "0.2 s on an idle core"


def test_a_job_imports_no_other_job() -> None:
    code = "import sys; from particlejax import main; main._function('train'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    others = {
        f"particlejax.{job.function.partition(':')[0]}"
        for name, job in jobs.JOBS.items()
        if name != "train"
    }
    assert not others & loaded


def test_every_job_has_its_function() -> None:
    assert all(callable(entry._function(job)) for job in jobs.JOBS)


def test_help_of_an_experiment_shows_values_defaults_and_what_is_allowed(
    capsys: pytest.CaptureFixture,
) -> None:
    code, out, err = command(
        capsys,
        "--config=quickstart:tiny",
        "--config.seed=7",
        "--config.data.image_size=96",
        "--help",
    )
    text = " ".join(out.split())
    assert code == 0 and not err
    assert re.search(r"^  seed +7 ", out, re.MULTILINE)
    assert re.search(r"96 height and width .* \[whole number of 1 or more\] \(default 64\)", text)
    config = config_files.load("quickstart:tiny")
    for section in config_help.sections(Experiment, config.to_dict()):
        assert (f"\n{section.path}\n" in out) == section.listed
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_of_every_experiment(capsys: pytest.CaptureFixture, name: str) -> None:
    code, out, err = command(capsys, "--config", name, "--help")
    assert code == 0 and not err and "\nconfig\n" in out


def test_help_of_a_section(capsys: pytest.CaptureFixture) -> None:
    for section in ("optim", "finetune.optim", "augment", "eval", "particles"):
        code, out, _ = command(capsys, "--config=quickstart", f"--help={section}")
        heads = [line for line in out.splitlines() if line.startswith("config")]
        assert code == 0 and heads
        assert all(f".{section}" in head for head in heads)
    code, out, _ = command(capsys, "--config=quickstart", "--help", "optim")
    assert out.count("\nconfig.stages") == 1 and out.startswith("config.stages")
    code, out, _ = command(capsys, "--help=contrastive")
    assert code == 0 and "config.stages.NAME.objectives.contrastive" in out and "[infonce" in out
    code, out, _ = command(capsys, "--config=quickstart", "--help=contrastive")
    assert code == 0 and "objectives.contrastive  (not in this config yet)" in out
    code, out, _ = command(capsys, "--config=quickstart", "--help=lr")
    assert code == 0 and "peak learning rate" in out and "weight_decay" not in out
    code, out, err = command(capsys, "--config=quickstart", "--help=optm")
    assert code == 2 and not out and "there is no section 'optm', did you mean optim?" in err


PLACES = {
    "lr": "config.stages.pretrain.optim.",
    "weight_deca": "config.stages.pretrain.optim.weight_decay",
    "optim.lr": "config.stages.pretrain.optim.",
    "stages.finetune.lr": "config.stages.finetune.optim.",
    "batch_size": "config.stages.pretrain.",
    "wd": "config.stages.pretrain.optim.weight_decay",
    "weight_decay": "config.stages.pretrain.optim.weight_decay",
    "optim.weight_decay": "config.stages.pretrain.optim.weight_decay",
    "stages.pretrian.optim.weight_decay": "config.stages.pretrain.optim.weight_decay?",
    "stages.finetune.optim.wd": "config.stages.finetune.optim.weight_decay?",
    "stages.pretrain.objectives.contrst.weight": "config.stages.pretrain.objectives.contrastive?",
    "stages.pretrain.objectives.mae.weight": "config.stages.pretrain.objectives.masked_autoencoder",
    "data.sorce": "config.data.source?",
    "dat.source": "config.data.source?",
    "img_size": "config.data.",
}


@pytest.mark.parametrize(("key", "place"), PLACES.items())
def test_an_unknown_key_is_answered_with_its_full_place(
    capsys: pytest.CaptureFixture, key: str, place: str
) -> None:
    code, _, err = command(capsys, "--config=quickstart:tiny", f"--config.{key}=1")
    assert code == 2 and len(err.splitlines()) == 1
    assert place in err.partition("did you mean ")[2], err


def test_a_spec_made_in_python_knows_other_names_too() -> None:
    rate = next(name for name in ("learning_rate", "rate") if name in vars(specs.OptimSpec))
    with pytest.raises(UserError, match=f"no key 'lr': did you mean OptimSpec.{rate}"):
        specs.section(specs.OptimSpec, lr=1)
    assert rate in map(synonyms.last_part, synonyms.synonyms("lr"))


def changed(*settings: str) -> Experiment:
    config = config_files.load("quickstart:tiny")
    config_files.apply_overrides(config, settings)
    return Experiment.of(config.to_dict())


def test_whole_numbers_may_be_written_as_1e3_and_1_000() -> None:
    for text in ("1e3", "1_000", "1000", "1000.0"):
        seed = changed(f"seed={text}", f"profile_steps=({text}, {text})")
        assert seed.seed == 1000 and isinstance(seed.seed, int)
        assert seed.profile_steps == (1000, 1000)
    with pytest.raises(UserError, match=r"config.seed is 1\.5: write a whole number"):
        changed("seed=1.5")


def test_values_are_read_by_the_type_of_their_key() -> None:
    experiment = changed(
        "init_from=123",
        "data.image_mean=1",
        "model.qk_norm",
        "data.modalities=vision,text",
        "eval.splits=val",
        "stage_order=('finetune',)",
        "stages.finetune.init_from=",
    )
    assert experiment.init_from == "123" and isinstance(experiment.data.image_mean, float)
    assert experiment.model.qk_norm is True and experiment.data.modalities == ("vision", "text")
    assert experiment.eval.splits == ("val",) and experiment.stage_order == ("finetune",)
    assert experiment.stages["finetune"].init_from == ""


def test_a_whole_objective_is_added_from_the_command_line() -> None:
    experiment = changed("stages.pretrain.objectives.contrastive.weight=2")
    assert set(experiment.stages["pretrain"].objectives) == {"masked_autoencoder", "contrastive"}
    assert experiment.stages["pretrain"].objectives["contrastive"] == objectives.ContrastiveSpec(
        weight=2.0
    )
    assert (
        "clip_order"
        in changed("stages.pretrain.objectives.clip_order={}").stages["pretrain"].objectives
    )


def test_what_a_stage_changes_of_a_section_is_set_alone() -> None:
    experiment = changed(
        "stages.pretrain.data.augment.mixup_alpha=0.5", "data.augment={'cutmix_alpha': 1}"
    )
    stage = experiment.stages["pretrain"]
    assert stage.data == {"augment": {"mixup_alpha": 0.5}}
    assert experiment.data_of(stage).augment.cutmix_alpha == 1.0
    with pytest.raises(UserError, match=r"config\.data is a section: set one of its keys"):
        changed("data=3")
    with pytest.raises(
        UserError, match=r"config\.init_from has no value: write --config\.init_from"
    ):
        changed("init_from")


def test_flags_are_read_in_every_usual_way() -> None:
    line = entry.parse(
        [
            "-config",
            "a.py",
            "--config.seed",
            "3",
            "--noconfig.model.rope",
            "--config.model.unroll_layers",
            "--workdir=x",
        ]
    )
    assert line == ("a.py", ("seed=3", "model.rope=false", "model.unroll_layers"), "x", None)
    assert entry.parse(["--config.data.mean", "-7"]).settings == ("data.mean=-7",)
    with pytest.raises(UserError, match="there is no flag '--confg': did you mean --config"):
        entry.parse(["--confg=x"])
    with pytest.raises(UserError, match="--workdir has no value"):
        entry.parse(["--workdir"])


def test_experiments_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_files.load("quickstart:tiny").data.source == "toybox:tiny"
    here = Path("experiments/pretrain/mae.py")
    assert config_files.find("pretrain/mae").samefile(here)
    monkeypatch.chdir(tmp_path)
    assert config_files.find("pretrain/mae") == ROOT / here
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.py").write_text("def get_config(): return 'mine'")
    assert config_files.load("quickstart") == "mine", "the working directory's comes first"


NO_EXPERIMENTS = {
    "broken.py": ("a = 1\ndef get_config(:\n", "{file}, line 2: invalid syntax"),
    "empty.py": ("a = 1\n", "{file} is not an experiment file: it has no function get_config"),
    "imports.py": ("import no_such_losses", "{file}, line 1: No module named 'no_such_losses': "),
    "broken_import.py": ("import broken", "broken.py, line 2: .*; correct the file, which {file}"),
    "nothing.py": ("def get_config():\n    pass", "get_config of {file} returns NoneType: return"),
    "latin.py": ("def get_config():\n    'caf\udce9'", "{file}, line 2: .*codec can't decode"),
    "no_arg.py:tiny": ("def get_config(): return {{}}", "get_config of {file}: .*out ':tiny'"),
    "arg.py": ("def get_config(arg): return {{}}", "get_config of {file}: .*'arg': write --config"),
    "dots.py": (
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({{'sweep': {{'runs': {{'lr-0.1': {{}}}}}}}})",
        "{file}, line 2: a ConfigDict takes no name with a dot: give names with dots to `section`",
    ),
    "folder": ("", "{file} is a folder, not an experiment file: give a Python file, such as "),
}


def test_what_is_no_experiment_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "folder").mkdir()
    cases = {"README.md": "README.md is not an experiment file: give a Python file"}
    for name, (text, sentence) in NO_EXPERIMENTS.items():
        file = tmp_path / name.partition(":")[0]
        if file.suffix:
            file.write_bytes(text.format().encode(errors="surrogateescape"))
        cases[str(tmp_path / name)] = sentence.format(file=re.escape(str(file)))
    for file, sentence in cases.items():
        code, out, err = command(capsys, "--config", file)
        assert code == 2 and not out and len(err.splitlines()) == 1, err
        assert re.match(f"particlejax: .*{sentence}", err), err
    code, _, err = command(capsys, "--config", "experiments/pretrain")
    assert code == 2 and "such as experiments/pretrain/" in err


def test_an_exception_in_an_experiment_file_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "own.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    code, _, err = command(capsys, "--config", str(file))
    lines = err.splitlines()
    assert code == 2 and lines[:2] == [
        "Traceback (most recent call last):",
        f'  File "{file}", line 2, in get_config',
    ]
    assert lines[-1] == (
        f"particlejax: {file}, line 2: ZeroDivisionError: division by zero: correct the file."
    )


def test_an_experiment_file_may_return_a_dict(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.py").write_text("def get_config(): return {'sweep': {'runs': {'lr-0.1': {}}}}")
    config, changed = config_files.configure(str(tmp_path / "a.py"), ["seed=3"])
    assert config.to_dict() == {"sweep": {"runs": {"lr-0.1": {}}}, "seed": 3}
    assert changed == ["seed"]
