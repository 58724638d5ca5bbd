"""Robot logs in HDF5, in the layouts of robomimic and of ALOHA, with clips of the pendulum of the LeRobot fixtures as pictures."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from headwater.tools.decode import array_of
from headwater.tools.ingest.hdf5 import read_hdf5
from headwater.tools.ingest.members import load

h5py = pytest.importorskip("h5py")
PENDULUM = Path(__file__).parents[2] / "fixtures" / "lerobot" / "v21"


def film(number: int, camera: str = "front") -> np.ndarray:
    with av.open(str(PENDULUM / f"videos/chunk-000/observation.images.{camera}/episode_{number:06d}.mp4")) as media:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)])


def rows(number: int) -> tuple[np.ndarray, np.ndarray]:
    table = parquet.read_table(PENDULUM / f"data/chunk-000/episode_{number:06d}.parquet")
    action, state = (np.array(table[name].to_pylist(), np.float32) for name in ("action", "observation.state"))
    return action.reshape(len(action), -1), state


def jpeg(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def robomimic(path: Path, demos: int = 3) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}})
        for number in range(demos):
            action, state = rows(number % 3)
            demo = data.create_group(f"demo_{8 + number}")
            demo["actions"] = np.repeat(action, 7, 1).astype(np.float64)
            demo["obs/robot0_eef_pos"] = state
            demo["obs/robot0_gripper_qpos"] = state[:, :2]
            demo["obs/object"] = state[:, 0]
            demo["obs/agentview_image"] = film(number % 3)
            demo["obs/wrist_image"] = film(number % 3, "hub")
            demo["obs/agentview_depth"] = np.zeros((len(action), 8, 8, 1), np.float32)
    return path


def aloha(path: Path, number: int, form: str = "raw", extra: int = 0) -> Path:
    action, state = rows(number)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        file["action"] = action
        file["observations/qpos"] = state
        file["observations/qpos"].attrs["names"] = ["joint_cos", "joint_sin", "joint_velocity"]
        pictures = film(number)
        if form == "raw":
            file["observations/images/top"] = pictures[: len(pictures) + extra]
        elif form == "padded":
            rows_ = [jpeg(picture) for picture in pictures]
            longest = max(map(len, rows_))
            file["observations/images/top"] = np.stack([np.pad(row, (0, longest - len(row))) for row in rows_])
        else:
            item = file.create_dataset("observations/images/top", (len(pictures),), h5py.vlen_dtype(np.uint8))
            for i, picture in enumerate(pictures):
                item[i] = jpeg(picture)
    return path


def members(found: Any, number: int) -> dict[str, bytes]:
    loaded = load(pickle.loads(pickle.dumps(found.samples[number])))
    assert hasattr(loaded, "members"), loaded
    return loaded.members


def pixels(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as media:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)])


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_robomimic_has_many_episodes_in_one_file(tmp_path: Path):
    found = read_hdf5(robomimic(tmp_path / "lift.hdf5"))
    assert [sample.name for sample in found.samples] == [f"lift.hdf5/data/demo_{n}" for n in (8, 9, 10)]
    action = [slot["name"] for slot in found.header["action"]["slots"]]
    assert action == [f"action_{i}" for i in range(7)]
    state = {slot["name"]: slot["kind"] for slot in found.header["state"]["slots"]}
    assert state == {
        "object": "unknown",
        "robot0_eef_pos_0": "end_effector_position",
        "robot0_eef_pos_1": "end_effector_position",
        "robot0_eef_pos_2": "end_effector_position",
        "robot0_gripper_qpos_0": "gripper",
        "robot0_gripper_qpos_1": "gripper",
    }
    assert (found.header["fps"], found.header["robot"]) == (20, "Panda")
    assert "left out: agentview_depth: 3 episodes" in found.report
    assert "3 of them have no clock: only numbers of rows and frames were compared" in found.report
    for number in range(3):
        made, (action_, state_) = members(found, number), rows(number)
        assert {*made} == {"agentview.mp4", "wrist.mp4", "action.npy", "state.npy", "json"}
        np.testing.assert_array_equal(array_of(made["action.npy"]), np.repeat(action_, 7, 1))
        np.testing.assert_array_equal(array_of(made["state.npy"]), np.c_[state_[:, 0], state_, state_[:, :2]])
        assert pixels(made["agentview.mp4"]).shape == film(number).shape
        assert off(pixels(made["agentview.mp4"]), film(number)) < 2
        assert off(pixels(made["wrist.mp4"]), film(number, "hub")) < 4
        facts = json.loads(made["json"])
        assert (facts["file"], facts["world"], facts["steps"]) == ("lift.hdf5", "Lift", len(action_))
    whole = np.concatenate([rows(n)[0] for n in range(3)]).astype(np.float64)
    assert found.header["action"]["mean"] == pytest.approx([whole.mean()] * 7)
    assert found.header["action"]["std"] == pytest.approx([whole.std()] * 7)


@pytest.mark.parametrize("form", ["raw", "padded", "vlen"])
def test_aloha_has_one_episode_per_file(tmp_path: Path, form: str):
    for number in range(3):
        aloha(tmp_path / f"episode_{number}.hdf5", number, form)
    found = read_hdf5(tmp_path)
    assert not found.skipped
    assert [sample.name for sample in found.samples] == ["episode_0.hdf5", "episode_1.hdf5", "episode_2.hdf5"]
    assert [slot["kind"] for slot in found.header["state"]["slots"]] == ["joint", "joint", "joint_velocity"]
    for number in range(3):
        made, (action, state) = members(found, number), rows(number)
        assert {*made} == {"mp4", "action.npy", "state.npy", "json"}
        assert array_of(made["action.npy"]).tobytes() == action.tobytes()
        assert array_of(made["state.npy"]).tobytes() == state.tobytes()
        clip = pixels(made["mp4"])
        assert len(clip) == len(action)
        assert off(clip, film(number)) < 2


def test_robots_with_other_slots_are_joined_by_name(tmp_path: Path):
    for number, names in enumerate((["waist", "gripper"], ["gripper", "elbow", "waist"])):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["action"] = np.arange(10.0 * len(names)).reshape(10, -1)
            file["action"].attrs["names"] = names
            file.attrs["fps"], file.attrs["instruction"] = 50, f"task {number}"
    found = read_hdf5(tmp_path)
    assert [slot["name"] for slot in found.header["action"]["slots"]] == ["waist", "gripper", "elbow"]
    assert [sample.texts["txt"] for sample in found.samples] == ["task 0", "task 1"]
    array = array_of(members(found, 1)["action.npy"])
    np.testing.assert_array_equal(array[0], [2, 0, 1])
    assert np.isnan(array_of(members(found, 0)["action.npy"])[:, 2]).all()


def test_clocks_of_rows_and_cameras_are_compared(tmp_path: Path):
    start = 1_700_000_000_000_000_000
    for name, late in (("good", 4e6), ("late", 40e6)):
        path = aloha(tmp_path / f"{name}.hdf5", 0)
        with h5py.File(path, "a") as file:
            stamps = start + np.arange(25) * 50_000_000
            file["timestamps"], file["observations/images/top_timestamps"] = stamps, stamps + int(late)
            file.attrs["fps"] = 20
    found = read_hdf5(tmp_path)
    assert [sample.name for sample in found.samples] == ["good.hdf5"]
    assert found.report[0] == "1 of 2 episodes are aligned: steps differ by 0.0 ms at most, frames lie within 4.0 ms of their rows"
    assert found.skipped[0].reason == "misaligned: camera top is 40 ms off at row 0 and 40 at most; expected 25, half a step"
    facts = json.loads(members(found, 0)["json"])
    assert (facts["start"], facts["rate"]) == (pytest.approx(1_700_000_000), 20)
    assert len(read_hdf5(tmp_path, allow_misaligned=True).samples) == 2


def test_uneven_steps_keep_their_times(tmp_path: Path):
    path = aloha(tmp_path / "a.hdf5", 1)
    times = np.arange(21) / 50 + np.where(np.arange(21) % 2, 0.004, 0)
    with h5py.File(path, "a") as file:
        file["timestamps"] = times
    found = read_hdf5(path)
    made = members(found, 0)
    np.testing.assert_array_equal(array_of(made["time.npy"]), times)
    assert json.loads(made["json"])["jitter_ms"] == pytest.approx(4)


def test_misaligned_logs_are_refused_or_cut(tmp_path: Path):
    aloha(tmp_path / "short.hdf5", 0, extra=-1)
    with h5py.File(aloha(tmp_path / "state.hdf5", 1), "a") as file:
        qpos = file["observations/qpos"][:-2]
        del file["observations/qpos"]
        file["observations/qpos"] = qpos
    aloha(tmp_path / "whole.hdf5", 2)
    found = read_hdf5(tmp_path)
    assert {skip.source: skip.reason for skip in found.skipped} == {
        "short.hdf5": "misaligned: camera top has 24 frames for 25 rows",
        "state.hdf5": "misaligned: qpos has 19 rows, action 21",
    }
    allowed = read_hdf5(tmp_path, allow_misaligned=True)
    made = {sample.name: members(allowed, number) for number, sample in enumerate(allowed.samples)}
    assert len(array_of(made["short.hdf5"]["action.npy"])) == len(pixels(made["short.hdf5"]["mp4"])) == 24
    state = array_of(made["state.hdf5"]["state.npy"])
    assert state.shape[0] == 21
    assert np.isnan(state[19:]).all()


def test_lists_of_robomimic_are_the_splits(tmp_path: Path):
    path = robomimic(tmp_path / "lift.hdf5")
    with h5py.File(path, "a") as file:
        file["mask/train"], file["mask/valid"] = np.array([b"demo_8", b"demo_9"]), np.array([b"demo_10"])
    assert [sample.split for sample in read_hdf5(path).samples] == ["train", "train", "validation"]


def test_instruction_of_libero_is_the_text(tmp_path: Path):
    path = robomimic(tmp_path / "libero.hdf5", 1)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": ["lift the block"]})
    assert members(read_hdf5(path), 0)["txt"] == b"lift the block"


def test_what_cannot_be_read_is_skipped_by_name(tmp_path: Path):
    (tmp_path / "broken.hdf5").write_bytes(b"not HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["velocity"] = np.zeros(3)
    with h5py.File(aloha(tmp_path / "pictures.hdf5", 0, "padded"), "a") as file:
        file["observations/images/top"][3] = 0
    with h5py.File(robomimic(tmp_path / "lift.hdf5", 2), "a") as file:
        del file["data/demo_9/actions"]
        file["data/demo_9/actions"] = np.zeros((3, 2, 2))
    found = read_hdf5(tmp_path)
    reasons = {skip.source: skip.reason for skip in found.skipped}
    assert "broken.hdf5" in reasons
    assert reasons["other.h5"] == "it holds velocity; expected data/demo_N/actions (robomimic) or /action (ALOHA)"
    assert "has the shape (3, 2, 2); expected (T, slots)" in reasons["lift.hdf5/data/demo_9"]
    assert [sample.name for sample in found.samples] == ["lift.hdf5/data/demo_8", "pictures.hdf5"]
    assert "cannot identify image" in load(found.samples[1]).reason
    with pytest.raises(SystemExit, match="holds no HDF5 file"):
        read_hdf5(Path(__file__).parent)
