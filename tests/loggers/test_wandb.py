"""WandbLogger: what an offline run has kept, read back from its file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.loggers import WandbLogger
from raylight.worker.metrics.call_packing import pack
from tests.loggers.wandb_file import read_offline

wandb = pytest.importorskip("wandb")
STEP = "trainer/global_step"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


def use_everything(module) -> None:
    logger, rank = module.logger, module.global_rank
    assert isinstance(logger, WandbLogger)
    logger.log_image("picture", [torch.full((3, 4, 4), rank / 2)], caption=[f"rank {rank}"])
    logger.log_table("table", columns=["rank", "picture"], data=[[rank, wandb.Image(torch.zeros(3, 2, 2))]])
    logger.log_text("words", columns=["a"], data=[["b"]])
    for at in range(3):
        logger.experiment.log({f"own/{rank}": 10 * module.current_epoch + at})
    logger.experiment.config["added"] = logger.experiment.id
    logger.experiment.summary.update({"of rank": rank})
    if rank == 0:
        logger.log_metrics({"by_hand": 1.0}, step=7)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_an_offline_run_keeps_values_media_and_checkpoints(num_workers, train, make_net, tmp_path, request):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    logger = WandbLogger(save_dir=tmp_path, project="p", name="n", mode="offline", log_model="all", prefix="x")
    net = make_net(layers={"sizes": (3, 1)})
    logger.watch(net, log="all", log_freq=2)
    options = {"log_every_n_steps": 1} if num_workers else {}
    _, trainer = train(logger, use_everything, net, num_workers=num_workers, **options)
    assert (logger.name, logger.save_dir, logger.version) == ("p", str(tmp_path), logger.experiment.id)
    logger.experiment.log({"after": 1})
    wandb.finish()
    kept = read_offline(tmp_path)

    num_steps = trainer.global_step
    losses = [(row[STEP], row["x-epoch"]) for row in kept.history if "x-train/loss" in row]
    assert losses == ([(step, (step - 1) // (num_steps // 2)) for step in range(1, num_steps + 1)]
                      if num_workers else [(5, 0), (10, 1)])  # fmt: skip
    measured = trainer.callback_metrics["val_loss"].item()
    assert kept.values("x-val_loss")[-1] == pytest.approx(measured)
    assert kept.values("x-by_hand") == [1.0, 1.0]
    assert kept.values("after") == [1]
    for rank in range(max(1, num_workers)):  # each in its order
        assert kept.values(f"own/{rank}") == [0, 1, 2, 10, 11, 12]
    captions = [text for row in kept.values("picture.captions") for text in row]
    assert sorted(captions) == sorted(2 * [f"rank {rank}" for rank in range(max(1, num_workers))])
    for names in kept.values("picture.filenames"):
        assert (kept.folder / "files" / names[0]).read_bytes().startswith(b"\x89PNG")
    tables = [json.loads((kept.folder / "files" / path).read_text()) for path in kept.values("table.path")]
    assert sorted({table["data"][0][0] for table in tables}) == list(range(max(1, num_workers)))
    assert len(kept.values("words.path")) == 2 * max(1, num_workers)
    assert (kept.config["lr"], kept.config["layers"]) == (0.1, {"sizes": [3, 1]})
    assert kept.config["added"] == logger.version
    for name in ("gradients/layer.weight", "parameters/layer.bias"):
        assert [sum(values) for values in kept.values(f"{name}.values")] == (num_steps // 2) * [
            3 if "weight" in name else 1
        ]

    models = [artifact for artifact in kept.artifacts if artifact.type == "model"]
    assert json.loads(models[-1].metadata)["original_filename"] == f"step-{num_steps:08}"
    assert sorted(models[-1].aliases) == ["best", "latest"]
    files = {entry.path: entry for entry in models[-1].manifest.contents}
    assert files["manifest.json"].size == Path(trainer.result.last_checkpoint.path, "manifest.json").stat().st_size


def test_log_model_true_uploads_what_is_kept_at_the_end(train, tmp_path):
    logger = WandbLogger(save_dir=tmp_path, mode="offline", log_model=True, checkpoint_name="best-net")
    train(logger)
    wandb.finish()
    models = [one for one in read_offline(tmp_path).artifacts if one.type == "model"]
    assert [(one.name, json.loads(one.metadata)["original_filename"]) for one in models] == [
        ("best-net", "step-00000010")
    ]


def test_it_works_without_a_trainer_and_goes_on_with_an_open_run(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True, id="abc")
    assert (logger.version, logger.name) == ("abc", "lightning_logs")
    logger.log_hyperparams({"kind": torch.nn.ReLU, "path": Path("a")})
    logger.log_metrics({"loss": torch.tensor(0.5)})
    with pytest.warns(UserWarning, match="goes on with it"):
        WandbLogger(project="other").log_metrics({"more": 1.0}, 3)
    wandb.finish()
    kept = read_offline(tmp_path)
    assert kept.folder.name.endswith("-abc")
    assert (kept.config["kind"], kept.config["path"]) == ("ReLU", "a")
    assert (kept.values("loss"), kept.values("more")) == ([0.5], [1.0])


def test_a_copy_in_another_process_opens_and_ends_a_run_of_its_own(tmp_path):
    logger = pickle.loads(pickle.dumps(WandbLogger(save_dir=tmp_path, offline=True)))
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("failed")
    assert wandb.run is None
    assert read_offline(tmp_path).exit_code == 1


def test_media_travel_with_the_bytes_of_their_file(tmp_path):
    image = wandb.Image(torch.ones(3, 4, 4), caption="c")
    table = wandb.Table(columns=["n", "image"], data=[[1, image]])
    packed, data = pack(((), {"table": table})), Path(image._path).read_bytes()
    Path(image._path).unlink()
    found = pickle.loads(packed)[1]["table"].data[0][1]
    assert Path(found._path).read_bytes() == data
    assert found._caption == "c"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offline": True, "log_model": True}, "log_model=True uploads, and offline=True does not"),
        ({"log_model": "al"}, "log_model='al'; it takes True, False, 'all'"),
    ],
)
def test_wrong_arguments_say_what_is_right(arguments, message):
    with pytest.raises(InvalidArguments, match=message):
        WandbLogger(**arguments)


def test_lists_that_do_not_fit_are_named(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    with pytest.raises(TypeError, match="a list is expected"):
        logger.log_image("a", torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="caption has 1 items for 2"):
        logger.log_image("a", [torch.zeros(3, 2, 2)] * 2, caption=["one"])
    with pytest.raises(InvalidArguments, match="'gradients', 'parameters', 'all', None"):
        logger.watch(pl.Module(), log="weights")
