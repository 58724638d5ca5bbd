"""LeRobot datasets, as lerobot itself wrote them (tests/fixtures/make_lerobot.py): what is in the shard is what was recorded."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import parquet

from headwater.datamodules.index import load_index
from headwater.tools.decode import array_of
from headwater.tools.ingest.lerobot import matches_lerobot, read_lerobot
from headwater.tools.ingest.members import load
from headwater.tools.shard import shard

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lerobot"
LENGTHS = [25, 21, 28]
CAMERAS = {"front.mp4": "observation.images.front", "hub.mp4": "observation.images.hub"}


def pixels(video: Path | bytes) -> np.ndarray:
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else str(video)) as media:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)]).astype(int)


def recorded(version: str) -> pa.Table:
    return pa.concat_tables([parquet.read_table(path) for path in sorted((FIXTURES / version / "data").glob("*/*.parquet"))])


def column(table: pa.Table, name: str, episode: int) -> np.ndarray:
    values = np.array(table.filter(pc.equal(table["episode_index"], episode))[name].to_pylist(), np.float32)
    return values.reshape(len(values), -1)


def members(found: Any, number: int) -> dict[str, bytes]:
    loaded = load(pickle.loads(pickle.dumps(found.samples[number])))
    assert hasattr(loaded, "members"), loaded
    return loaded.members


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_episodes_hold_the_recorded_rows_bit_for_bit(version: str):
    assert matches_lerobot(FIXTURES / version)
    found, table = read_lerobot(FIXTURES / version), recorded(version)
    assert [sample.name for sample in found.samples] == ["episode_000000", "episode_000001", "episode_000002"]
    assert not found.skipped
    for number, length in enumerate(LENGTHS):
        made = members(found, number)
        assert {*made} == {*CAMERAS, "action.npy", "state.npy", "txt", "json"}
        for name, of in (("action.npy", "action"), ("state.npy", "observation.state")):
            array = array_of(made[name])
            assert array.dtype == np.float32
            assert array.tobytes() == column(table, of, number).tobytes()
            assert len(array) == length
        assert made["txt"].decode() == ("swing the pendulum up", "bring the pendulum to rest")[number % 2]
        facts = json.loads(made["json"])
        assert (facts["fps"], facts["start"], facts["rate"], facts["steps"]) == (20, 0, 20, length)
        assert (facts["episode"], facts["robot"]) == (number, "pendulum")


def test_videos_of_v21_keep_their_bytes():
    found = read_lerobot(FIXTURES / "v21")
    for number in range(3):
        made = members(found, number)
        for name, camera in CAMERAS.items():
            path = FIXTURES / "v21/videos/chunk-000" / camera / f"episode_{number:06d}.mp4"
            assert made[name] == path.read_bytes()


def test_videos_of_v30_are_cut_to_the_frames_of_the_episode():
    found, table = read_lerobot(FIXTURES / "v30"), recorded("v30")
    meta = parquet.read_table(FIXTURES / "v30/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for name, camera in CAMERAS.items():
        path = FIXTURES / "v30/videos" / camera / "chunk-000/file-000.mp4"
        with av.open(str(path)) as media:
            stamps = np.array([float(frame.time) for frame in media.decode(video=0)])
        film = pixels(path)
        for number, length in enumerate(LENGTHS):
            clip = pixels(members(found, number)[name])
            assert len(clip) == length
            asked = meta[number][f"videos/{camera}/from_timestamp"] + column(table, "timestamp", number)[:, 0]
            for row in (0, length // 2, length - 1):
                there = int(np.abs(stamps - asked[row]).argmin())
                assert stamps[there] == pytest.approx(asked[row], abs=1e-4)
                assert np.abs(clip[row] - film[there]).mean() < 2.0
                # the right frame, not its neighbour: the picture moves more than the codec blurs
                beside = [i for i in (there - 1, there + 1) if 0 <= i < len(film) and np.abs(film[i] - film[there]).mean() > 1.5]
                assert all(np.abs(clip[row] - film[i]).mean() > np.abs(clip[row] - film[there]).mean() for i in beside)


def test_a_cut_clip_has_a_key_frame_every_eight_frames_at_the_declared_rate():
    made = members(read_lerobot(FIXTURES / "v30"), 2)
    assert made["front.mp4"] == members(read_lerobot(FIXTURES / "v30"), 2)["front.mp4"]
    with av.open(io.BytesIO(made["front.mp4"])) as media:
        stream = media.streams.video[0]
        frames = [(float(frame.time), frame.key_frame) for frame in media.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 20)
    assert [time for time, _ in frames] == pytest.approx([i / 20 for i in range(28)])
    keys = [i for i, (_, key) in enumerate(frames) if key]
    assert keys[0] == 0
    assert max(np.diff([*keys, 28])) <= 8


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_header_names_slots_and_equals_numpy(version: str):
    found, table = read_lerobot(FIXTURES / version), recorded(version)
    header = json.loads(json.dumps(found.header))
    assert (header["fps"], header["robot"]) == (20, "pendulum")
    assert header["action"]["slots"] == [{"name": "joint_torque", "kind": "joint_effort", "unit": ""}]
    assert [slot["name"] for slot in header["state"]["slots"]] == ["joint_cos", "joint_sin", "joint_velocity"]
    for part, of in (("action", "action"), ("state", "observation.state")):
        x = np.concatenate([column(table, of, number) for number in range(3)]).astype(np.float64)
        numbers = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0)}
        numbers |= {"q01": np.quantile(x, 0.01, axis=0), "q99": np.quantile(x, 0.99, axis=0), "count": np.full(x.shape[1], 74)}
        for name, expected in numbers.items():
            np.testing.assert_allclose(header[part][name], expected, rtol=1e-6)


def test_statistics_agree_with_those_that_lerobot_wrote():
    declared = json.loads((FIXTURES / "v30/meta/stats.json").read_text())
    header = read_lerobot(FIXTURES / "v30").header
    for part, of in (("action", "action"), ("state", "observation.state")):
        for name in ("mean", "min", "max"):
            np.testing.assert_allclose(header[part][name], declared[of][name], rtol=1e-4)


def test_pictures_in_parquet_become_a_clip_and_whole_numbers_stay_ids():
    from PIL import Image

    found, table = read_lerobot(FIXTURES / "images"), recorded("images")
    assert found.header["action"]["slots"] == [{"name": "command", "kind": "discrete", "unit": ""}]
    for number, mission in enumerate(("pick up the purple ball", "pick up the yellow box")):
        made, rows = members(found, number), table.filter(pc.equal(table["episode_index"], number)).to_pylist()
        assert {*made} == {"mp4", "action.npy", "state.npy", "txt", "json"}
        ids = array_of(made["action.npy"])
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(ids, [row["action"] for row in rows])
        assert made["txt"].decode() == mission
        clip = pixels(made["mp4"])
        truth = np.stack([np.asarray(Image.open(io.BytesIO(row["observation.image"]["bytes"])).convert("RGB")) for row in rows])
        assert clip.shape == truth.shape
        assert all(np.abs(clip[i] - truth[i].astype(int)).mean() < 4 for i in range(len(truth)))  # 4:2:0 blurs colours of edges


def test_datasets_in_one_folder_share_slots_by_name():
    found = read_lerobot(FIXTURES)
    assert matches_lerobot(FIXTURES)
    assert len(found.samples) == 8
    assert [slot["name"] for slot in found.header["action"]["slots"]] == ["command", "joint_torque"]
    made = {sample.name: array_of(sample.make()["action.npy"]) for sample in found.samples if sample.name.endswith("0")}
    assert np.isnan(made["v21/episode_000000"][:, 0]).all()
    assert not np.isnan(made["v21/episode_000000"][:, 1]).any()
    assert made["images/episode_000000"].shape == (10, 2)
    assert (found.header["fps"], found.header["robot"]) == (None, "minigrid, pendulum")


def test_the_command_writes_shards_with_the_header(tmp_path: Path):
    shard(str(FIXTURES / "v30"), str(tmp_path / "out"))
    index = load_index(tmp_path / "out" / "train-00000.tar")
    assert index.card.header["action"]["count"] == [74]
    assert {*index.extensions} == {*CAMERAS, "action.npy", "state.npy", "txt", "json"}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda version: Path(shutil.copytree(FIXTURES / version, tmp_path / version))


def data_of(root: Path, episode: int) -> Path:
    v2 = root / f"data/chunk-000/episode_{episode:06d}.parquet"
    return v2 if v2.exists() else root / "data/chunk-000/file-000.parquet"


def drop_row(root: Path) -> None:
    table = parquet.read_table(data_of(root, 1))
    keep = [not (e == 1 and i == 12) for e, i in zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist())]
    parquet.write_table(table.filter(pa.array(keep)), data_of(root, 1))


def freeze(root: Path) -> None:
    table = parquet.read_table(data_of(root, 1))
    rows = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), table["timestamp"].to_pylist())
    times = pa.array([t - 0.05 if (e, i) == (1, 9) else t for e, i, t in rows], pa.float32())
    parquet.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), data_of(root, 1))


def wrong_rate(root: Path) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"fps": 10}))


def shorten(root: Path) -> None:
    """The last frame of the file goes, without decoding."""
    old = next(path for path in (root / "videos").rglob("*.mp4") if "front" in str(path) and path.stem.endswith(("1", "file-000")))
    new = old.with_suffix(".new.mp4")
    with av.open(str(old)) as source, av.open(str(new), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = [packet for packet in source.demux(video=0) if packet.pts is not None]
        for packet in packets[:-1]:
            packet.stream = stream
            target.mux(packet)
    new.replace(old)


CASES = [
    (
        drop_row,
        {1},
        ["20 rows, meta declares 21", "frame_index goes from 11 to 13 at row 12", "100 ms pass before row 12; expected 50"],
    ),
    (freeze, {1}, ["timestamps do not go on at row 9: 0.400 s after 0.400 s"]),
    (wrong_rate, {0, 1, 2}, ["10 rows per second are declared, 20 measured"]),
    (shorten, {-1}, ["camera observation.images.front has {n} frames for {m} rows"]),
]


@pytest.mark.parametrize("version", ["v21", "v30"])
@pytest.mark.parametrize(("harm", "which", "reasons"), CASES, ids=[case[0].__name__ for case in CASES])
def test_misaligned_episodes_are_refused_with_the_reason(
    copy: Callable[[str], Path], version: str, harm: Callable[[Path], None], which: set[int], reasons: list[str]
):
    root = copy(version)
    harm(root)
    which = which if which != {-1} else {1 if version == "v21" else 2}
    found = read_lerobot(root)
    assert {skip.source for skip in found.skipped} == {f"episode_{number:06d}" for number in which}
    for skip, number in zip(found.skipped, sorted(which)):
        assert skip.reason.startswith("misaligned: ")
        for reason in reasons:
            assert reason.format(n=LENGTHS[number] - 1, m=LENGTHS[number]) in skip.reason
    assert found.report[0].startswith(f"{3 - len(which)} of 3 episodes are aligned")
    assert any("refused" in line and found.skipped[0].source in line for line in found.report)
    allowed = read_lerobot(root, allow_misaligned=True)
    assert len(allowed.samples) == 3
    assert not allowed.skipped
    assert any(f"{len(which)} misaligned episodes are taken" in line for line in allowed.report)
    for number in which:
        made = members(allowed, number)
        steps = len(array_of(made["action.npy"]))
        assert steps == len(pixels(made["front.mp4"])) == len(pixels(made["hub.mp4"])) == json.loads(made["json"])["steps"]
        assert steps == LENGTHS[number] - (harm in (drop_row, shorten))
        assert json.loads(made["json"])["misaligned"]


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_after_a_lost_row_the_others_keep_their_frames(copy: Callable[[str], Path], version: str):
    root = copy(version)
    whole = pixels(members(read_lerobot(root), 1)["front.mp4"])
    drop_row(root)
    made = members(read_lerobot(root, allow_misaligned=True), 1)
    clip = pixels(made["front.mp4"])
    for row, frame in ((11, 11), (12, 13), (19, 20)):
        assert np.abs(clip[row] - whole[frame]).mean() < 1.0
    np.testing.assert_allclose(array_of(made["time.npy"]), np.delete(np.arange(21), 12) / 20, atol=1e-6)


def test_rows_that_changed_since_they_were_recorded_are_noted(copy: Callable[[str], Path]):
    root = copy("v21")
    table = parquet.read_table(data_of(root, 0))
    action = pa.array([[2 * v for v in np.atleast_1d(row)] for row in table["action"].to_pylist()], pa.list_(pa.float32()))
    parquet.write_table(table.set_column(table.column_names.index("action"), "action", action), data_of(root, 0))
    found = read_lerobot(root)
    assert len(found.samples) == 3
    assert "action has another mean than in meta: 1 episodes" in found.report


def test_what_is_missing_or_broken_is_skipped_by_name(copy: Callable[[str], Path]):
    root = copy("v21")
    data_of(root, 0).write_bytes(b"not parquet")
    (root / "videos/chunk-000/observation.images.hub/episode_000001.mp4").unlink()
    parquet.write_table(parquet.read_table(data_of(root, 2)).drop_columns(["action"]), data_of(root, 2))
    reasons = {skip.source: skip.reason for skip in read_lerobot(root).skipped}
    assert "Parquet" in reasons["episode_000000"]
    assert "missing file" in reasons["episode_000001"]
    assert reasons["episode_000002"] == "episode_000002.parquet has no column action"
    broken = copy("v30")
    (broken / "videos/observation.images.front/chunk-000/file-000.mp4").write_bytes(bytes(1000))
    assert len(read_lerobot(broken).skipped) == 3


@pytest.mark.parametrize(
    ("version", "path", "content", "reason"),
    [
        ("v21", "meta/episodes.jsonl", None, "episodes.jsonl"),
        ("v21", "meta/tasks.jsonl", b'{"task_index": 0}', "'task' is missing"),
        ("v30", "meta/tasks.parquet", b"PAR1", "whole LeRobot dataset"),
        ("v30", "meta/episodes/chunk-000/file-000.parquet", None, "meta/episodes holds no Parquet file"),
        ("v30", "meta/info.json", b'{"codebase_version": "v1.6"}', "codebase_version is v1.6; expected v2.0, v2.1 or v3.0"),
        ("v30", "meta/info.json", b'{"codebase_version": ', "whole LeRobot dataset"),
    ],
)
def test_meta_data_that_are_not_whole_end_the_command(
    copy: Callable[[str], Path], version: str, path: str, content: bytes | None, reason: str
):
    root = copy(version)
    (root / path).unlink() if content is None else (root / path).write_bytes(content)
    with pytest.raises(SystemExit, match=reason):
        read_lerobot(root)


def test_a_path_out_of_the_dataset_is_refused(copy: Callable[[str], Path]):
    root = copy("v21")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"data_path": "../{episode_index}.parquet"}))
    assert "expected one inside the dataset" in read_lerobot(root).skipped[0].reason


def test_splits_of_the_dataset_are_kept(copy: Callable[[str], Path]):
    root = copy("v30")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"splits": {"train": "0:2", "val": "2:3"}}))
    found = read_lerobot(root)
    assert [sample.split for sample in found.samples] == ["train", "train", "validation"]
    assert found.header["action"]["count"] == [46]


def test_other_folders_are_not_taken_for_lerobot(tmp_path: Path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    assert not matches_lerobot(tmp_path)
