"""LightningCLI, against Lightning's own on the same command lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.cli
import torch
import yaml
from torch import nn

import raylight
import raylight.cli
from raylight.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
    ReduceLROnPlateau,
    SaveConfigCallback,
)
from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from tests.cli.programs import ENCODER, QUIET, Data, Encoder, LightningData, LightningNet, Net

BOTH = {"raylight": (raylight.cli, Net, Data), "lightning": (pytorch_lightning.cli, LightningNet, LightningData)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # which Lightning sets
    return tmp_path


def run_cli(*args: str, kind: type[LightningCLI] = LightningCLI, **keywords: Any) -> LightningCLI:
    keywords = {"model_class": Net, "datamodule_class": Data, "trainer_defaults": QUIET, **keywords}
    return kind(args=list(args), **keywords)


def run_both(*args: str, **keywords: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The values that were logged last, by raylight and by Lightning."""
    found = []
    for library, (cli, net, data) in BOTH.items():
        made = cli.LightningCLI(net, data, args=list(args), trainer_defaults=QUIET | {"default_root_dir": library})
        found.append({name: float(value) for name, value in made.trainer.callback_metrics.items()})
    return found[0], found[1]


def read_config(cli: LightningCLI) -> dict[str, Any]:
    return yaml.safe_load(Path(str(cli.trainer.log_dir), "config.yaml").read_text())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="the module's own optimizer"),
        pytest.param(["--optimizer=Adam", "--optimizer.lr=0.05"], id="an optimizer"),
        pytest.param(
            ["--optimizer=SGD", "--optimizer.lr=0.5", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"],
            id="a scheduler",
        ),
        pytest.param(
            ["--optimizer=SGD", "--optimizer.lr=0.5", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss",
             "--lr_scheduler.patience=0", "--lr_scheduler.threshold=10"],
            id="a scheduler that follows a value",
        ),
        pytest.param(["--model.encoder.width=7", "--data.batch_size=8", "--seed_everything=7"], id="sizes and a seed"),
        pytest.param(["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss",
                      "--trainer.callbacks.stopping_threshold=2"], id="a callback by its name"),
    ],
)  # fmt: skip
def test_a_fit_logs_what_lightnings_logs(options: list[str]) -> None:
    ours, theirs = run_both("fit", ENCODER, "--trainer.max_epochs=3", *options)
    assert ours.keys() == theirs.keys() == {"loss", "val_loss"}
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_saved_configuration_runs_again_with_the_same_numbers() -> None:
    first = run_cli("fit", ENCODER, "--trainer.max_epochs=2", "--model.lr=0.02", "--optimizer=Adam")
    saved = f"{first.trainer.log_dir}/config.yaml"
    config = read_config(first)
    assert config["model"]["lr"] == 0.02
    assert config["seed_everything"] == 0
    assert config["optimizer"]["class_path"] == "torch.optim.Adam"
    again = run_cli("fit", "--config", saved)
    assert again.trainer.log_dir != first.trainer.log_dir
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    changed = run_cli("fit", "--config", saved, "--model.lr=0.5")
    assert changed.model.lr == 0.5


def test_a_configuration_that_lightning_saved_runs_here() -> None:
    theirs = pytorch_lightning.cli.LightningCLI(
        LightningNet, LightningData, trainer_defaults=QUIET,
        args=["fit", ENCODER, "--trainer.max_epochs=2", "--optimizer=Adam"],
    )  # fmt: skip
    ours = run_cli("fit", "--config", f"{theirs.trainer.log_dir}/config.yaml")
    assert float(ours.trainer.callback_metrics["loss"]) == pytest.approx(float(theirs.trainer.callback_metrics["loss"]))


def test_what_lightnings_trainer_alone_takes_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidArguments, match="model_registry is Lightning's"):
        run_cli("fit", ENCODER, "--trainer.model_registry=somewhere")


def test_print_config_shows_what_would_be_run_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli("fit", ENCODER, "--trainer.max_epochs=5", "--print_config")
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_epochs"] == 5
    assert shown["model"]["encoder"] == {"class_path": "tests.cli.programs.Encoder", "init_args": {"width": 3}}
    assert shown["data"] == {"batch_size": 4, "num_samples": 16}
    assert not list(Path().iterdir())


def test_help_has_the_documentation_of_the_trainers_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli("fit", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Epochs after which training ends" in text
    assert "model_registry" not in text


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["fit", ENCODER, "--trainer.max_epocs=1"], "max_epocs"),
        (["fit", ENCODER, "--model.lr=fast"], "model.lr"),
        (["fit"], "model.encoder"),
        (["train"], "train"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_made(
    args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(*args)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_classes_by_path() -> None:
    args = ["fit", "--trainer.max_epochs=1", f"--model={Net.__module__}.Net", f"--data={Data.__module__}.Data"]
    args += ["--model.encoder=tests.cli.programs.WideEncoder", "--model.encoder.factor=2", "--data.batch_size=2"]
    cli = run_cli(*args, model_class=None, datamodule_class=None)
    assert type(cli.model) is Net
    assert cli.model.encoder.width == 6
    assert cli.datamodule.batch_size == 2
    assert read_config(cli)["model"]["class_path"].endswith("programs.Net")
    base = run_cli(*args, model_class=Net, datamodule_class=Data, subclass_mode_model=True, subclass_mode_data=True)
    assert type(base.datamodule) is Data


def test_a_function_that_makes_the_module() -> None:
    def make_net(width: int = 2) -> raylight.Module:
        return Net(Encoder(width))

    cli = run_cli("fit", "--model.width=5", "--trainer.max_epochs=1", model_class=make_net)
    assert cli.model.encoder.width == 5
    assert cli.trainer.global_step == 4


def test_without_run_the_objects_are_made_and_nothing_else() -> None:
    cli = run_cli(ENCODER, "--trainer.max_epochs=1", run=False)
    assert cli.subcommand is None
    assert cli.trainer.global_step == 0
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 4
    assert read_config(cli)["trainer"]["max_epochs"] == 1
    results = cli.trainer.test(cli.model, datamodule=cli.datamodule)  # in the same version, whose file is there
    assert set(results[0]) == {"test_loss"}


@pytest.mark.parametrize("as_dict", [True, False])
def test_args_as_a_dict_and_as_a_list(as_dict: bool) -> None:
    given: Any = {"model": {"encoder": "tests.cli.programs.Encoder", "lr": 0.3}, "trainer": {"max_epochs": 1}}
    words = [ENCODER, "--model.lr=0.3", "--trainer.max_epochs=1"]
    cli = LightningCLI(Net, Data, trainer_defaults=QUIET, run=False, args=given if as_dict else words)
    assert cli.model.lr == 0.3


def test_args_beside_words_of_the_command_line_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script.py", "fit"])
    with pytest.warns(UserWarning, match="are not read"):
        run_cli(ENCODER, run=False)


def test_hooks_of_a_subclass_come_in_their_order() -> None:
    seen: list[str] = []

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            seen.append("add_arguments_to_parser")
            parser.add_argument("--note", default="none")
            parser.link_arguments("data.batch_size", "model.label", compute_fn=str)
            parser.add_lightning_class_args(raylight.callbacks.EarlyStopping, "stopper")
            parser.set_defaults({"stopper.monitor": "val_loss", "stopper.patience": 5})

        def before_instantiate_classes(self) -> None:
            seen.append(f"before_instantiate_classes {hasattr(self, 'model')}")

        def after_instantiate_classes(self) -> None:
            seen.append(f"after_instantiate_classes {self.trainer.global_step}")

        def instantiate_trainer(self, **kwargs: Any) -> raylight.Trainer:
            seen.append("instantiate_trainer")
            return super().instantiate_trainer(max_epochs=1, **kwargs)

        def before_fit(self) -> None:
            seen.append(f"before_fit {self.trainer.global_step}")

        def after_fit(self) -> None:
            seen.append(f"after_fit {self.trainer.global_step}")

    cli = run_cli("fit", ENCODER, "--data.batch_size=2", "--note=yes", kind=Command)
    start = seen.index("before_instantiate_classes False")
    assert set(seen[:start]) == {"add_arguments_to_parser"}
    assert seen[start:] == [
        "before_instantiate_classes False", "instantiate_trainer", "after_instantiate_classes 0", "before_fit 0",
        "after_fit 8",
    ]  # fmt: skip
    assert cli.config["fit"]["note"] == "yes"
    assert cli.model.hparams.label == "2"
    assert [type(callback).__name__ for callback in cli.trainer.callbacks] == ["EarlyStopping", "SaveConfigCallback"]
    assert cli.trainer.callbacks[0].patience == 5


def test_a_link_to_an_object_that_was_made() -> None:
    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            link = {"apply_on": "instantiate", "compute_fn": lambda count: f"{count} samples"}
            parser.link_arguments("data.num_samples", "model.label", **link)

    cli = run_cli("fit", ENCODER, "--trainer.max_epochs=1", "--data.num_samples=8", kind=Command)
    assert cli.model.hparams.label == "8 samples"


def test_a_subcommand_and_a_method_of_ones_own() -> None:
    class Command(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "count": {"model"}}

    class Counting(raylight.Trainer):
        def count(self, model: raylight.Module, factor: int = 1) -> None:
            """Counts parameters."""
            self.counted = factor * sum(parameter.numel() for parameter in model.parameters())

    cli = run_cli("count", ENCODER, "--factor=2", kind=Command, trainer_class=Counting, datamodule_class=None)
    assert cli.trainer.counted == 2 * (4 * 3 + 3 + 3 + 1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_gives_the_models_arguments(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run_cli("fit", ENCODER, "--model.encoder.width=9", "--trainer.max_epochs=1")
    path = fitted.trainer.checkpoint_callback.best_model_path
    cli = run_cli(stage, ENCODER, f"--ckpt_path={path}")
    assert cli.model.encoder.width == 9  # not the default
    assert torch.equal(cli.model.head.weight, fitted.model.head.weight)


def test_hyperparameters_are_the_configuration_and_load_again() -> None:
    cli = run_cli("fit", ENCODER, "--model.encoder.width=9", "--trainer.max_epochs=1", "--model.lr=0.3")
    assert cli.model.hparams.encoder == {"class_path": "tests.cli.programs.Encoder", "init_args": {"width": 9}}
    path = cli.trainer.checkpoint_callback.best_model_path
    loaded = Net.load_from_checkpoint(path)
    assert (loaded.encoder.width, loaded.lr) == (9, 0.3)
    assert loaded.hparams == cli.model.hparams
    assert torch.equal(loaded.encoder.layer.weight, cli.model.encoder.layer.weight)
    assert Net.load_from_checkpoint(path, lr=0.7).lr == 0.7
    assert "_instantiator" not in raylight.open_run(str(cli.trainer.log_dir)).record.get("hyperparameters", {})


def test_a_checkpoint_imports_no_code() -> None:
    cli = run_cli("fit", ENCODER, "--trainer.max_epochs=1")
    path = cli.trainer.checkpoint_callback.best_model_path
    Path("evil.py").write_text("class Encoder: ...")
    other = {"encoder": {"class_path": "evil.Encoder"}}
    from raylight.cli import instantiate_module

    with pytest.raises(CheckpointMismatch, match=r"not imported: evil\.Encoder"):
        instantiate_module(Net, other)
    with pytest.raises(CheckpointMismatch, match=r"os\.system"):
        instantiate_module(Net, {"encoder": {"class_path": "os.system", "init_args": {"command": "touch /tmp/x"}}})
    assert Net.load_from_checkpoint(path).encoder.width == 3


def test_optimizers_linked_to_arguments_of_the_module() -> None:
    class Two(Net):  # type: ignore[misc, valid-type]
        def __init__(self, encoder: nn.Module, first: dict, second: dict) -> None:
            super().__init__(encoder)
            self.first, self.second = first, second

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return raylight.cli.instantiate_class((self.parameters(),), self.second)

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, nested_key="one", link_to="model.first")
            parser.add_optimizer_args((torch.optim.SGD,), nested_key="two", link_to="model.second")

    cli = run_cli(
        "fit", ENCODER, "--one.lr=0.5", "--two=SGD", "--two.lr=0.25", "--trainer.max_epochs=1",
        kind=Command, model_class=Two, auto_configure_optimizers=False,
    )  # fmt: skip
    assert cli.model.first["class_path"] == "torch.optim.adam.Adam"
    assert cli.model.first["init_args"]["lr"] == 0.5
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_several_automatic_optimizers_are_refused() -> None:
    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, nested_key="one")
            parser.add_optimizer_args(torch.optim.SGD, nested_key="two")

    with pytest.raises(InvalidArguments, match=r"\['one', 'two'\] are all AUTOMATIC"):
        run_cli("fit", ENCODER, kind=Command)


def test_an_optimizer_as_an_argument_of_the_module() -> None:
    class Free(Net):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            encoder: nn.Module,
            optimizer: OptimizerCallable = torch.optim.SGD,
            scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
        ) -> None:
            super().__init__(encoder)
            self.make_optimizer, self.make_scheduler = optimizer, scheduler

        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    options = ["--model.optimizer=Adam", "--model.optimizer.lr=0.5", "--model.scheduler=StepLR"]
    options += ["--model.scheduler.step_size=1", "--model.scheduler.gamma=0.1", "--trainer.max_epochs=1"]
    cli = run_cli("fit", ENCODER, *options, model_class=Free, auto_configure_optimizers=False)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_configure_optimizers_of_a_subclass_and_the_warning() -> None:
    class Command(LightningCLI):
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            optimizer.param_groups[0]["lr"] *= 2
            return optimizer

    with pytest.warns(UserWarning, match=r"Net\.configure_optimizers is not called"):
        cli = run_cli("fit", ENCODER, "--optimizer=SGD", "--optimizer.lr=0.1", "--trainer.max_epochs=1", kind=Command)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.2


def test_save_config_callback_of_ones_own() -> None:
    class Own(SaveConfigCallback):
        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            Path("saved.yaml").write_text(self.parser.dump(self.config, skip_unset=False))

    cli = run_cli(
        "fit", ENCODER, "--trainer.max_epochs=1",
        save_config_callback=Own, save_config_kwargs={"save_to_log_dir": False},
    )  # fmt: skip
    assert yaml.safe_load(Path("saved.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert not os.path.exists(f"{cli.trainer.log_dir}/config.yaml")
    with pytest.raises(InvalidArguments, match="nothing would be saved"):
        run_cli("fit", ENCODER, save_config_kwargs={"save_to_log_dir": False})


def test_another_configuration_is_not_overwritten() -> None:
    cli = run_cli(ENCODER, "--trainer.max_epochs=1", run=False)
    Path(str(cli.trainer.log_dir)).mkdir(parents=True, exist_ok=True)
    saved = Path(str(cli.trainer.log_dir), "config.yaml")
    saved.write_text("another: 1\n")
    with pytest.raises(InvalidArguments, match="is there already and differs"):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert saved.read_text() == "another: 1\n"


def test_several_files_stay_several() -> None:
    Path("model.yaml").write_text("encoder: tests.cli.programs.Encoder\nlr: 0.25\n")
    cli = run_cli("fit", "--model=model.yaml", "--trainer.max_epochs=1", save_config_kwargs={"multifile": True})
    assert cli.model.lr == 0.25
    assert read_config(cli)["model"] == "model.yaml"
    assert "lr: 0.25" in Path(str(cli.trainer.log_dir), "model.yaml").read_text()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__MODEL__LR", "0.75")
    cli = run_cli("fit", ENCODER, "--trainer.max_epochs=1", parser_kwargs={"default_env": True})
    assert cli.model.lr == 0.75


def test_configuration_files_by_default_and_by_subcommand() -> None:
    Path("all.yaml").write_text("fit:\n  trainer:\n    max_epochs: 2\n")
    Path("fit.yaml").write_text("trainer:\n  max_epochs: 3\n")
    files = {"default_config_files": ["all.yaml"]}
    assert run_cli("fit", ENCODER, parser_kwargs=files).trainer.max_epochs == 2
    assert (
        run_cli("fit", ENCODER, parser_kwargs={"fit": {"default_config_files": ["fit.yaml"]}}).trainer.max_epochs == 3
    )


@pytest.mark.parametrize(("given", "expected"), [(False, None), (12, 12)])
def test_the_seed(given: bool | int, expected: int | None) -> None:
    cli = run_cli(ENCODER, run=False, seed_everything_default=given)
    assert cli.config["seed_everything"] == (expected if expected is not None else False)


def test_reduce_lr_on_plateau_knows_what_it_follows() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, "loss", patience=2)
    assert (scheduler.monitor, scheduler.patience) == ("loss", 2)
    with pytest.raises(InvalidArguments, match="does not inherit"):
        LightningArgumentParser().add_lr_scheduler_args(torch.optim.SGD)


def test_two_workers_write_the_configuration_and_take_the_optimizer(ray_cluster: object) -> None:
    defaults = QUIET | {"devices": 2}
    cli = run_cli("fit", ENCODER, "--trainer.max_epochs=2", "--optimizer=Adam", trainer_defaults=defaults)
    assert read_config(cli)["optimizer"]["class_path"] == "torch.optim.Adam"
    alone = run_cli("fit", ENCODER, "--trainer.max_epochs=2", "--optimizer=Adam", "--data.batch_size=8")
    assert torch.allclose(cli.model.head.weight, alone.model.head.weight, atol=1e-6)
    assert cli.model.configure_optimizers.module is cli.model
