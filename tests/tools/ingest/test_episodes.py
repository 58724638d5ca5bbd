"""Named slots, statistics and time alignment, each against a plain recomputation."""

import pickle
from functools import partial

import numpy as np
import pytest

from headwater.tools.decode import array_of
from headwater.tools.ingest.alignment import check, pick
from headwater.tools.ingest.episodes import Episode, Rows, extensions, gather
from headwater.tools.ingest.slots import Statistics, align, distinct, slots_of, union

NAMES = {
    "shoulder_pan.pos": "joint",
    "wrist_roll.pos": "joint",
    "left_forearm_roll": "joint",
    "robot0_joint_pos_cos_3": "joint",
    "motor_2": "joint",
    "gripper.pos": "gripper",
    "robot0_gripper_qpos_1": "gripper",
    "robot0_joint_vel_0": "joint_velocity",
    "qvel_4": "joint_velocity",
    "left_elbow_torque": "joint_effort",
    "robot0_eef_pos_2": "end_effector_position",
    "delta_x_ee": "end_effector_position",
    "cartesian_position.y": "end_effector_position",
    "x": "end_effector_position",
    "robot0_eef_quat_3": "end_effector_rotation",
    "ee_ori_0": "end_effector_rotation",
    "left_ee_qx": "end_effector_rotation",
    "yaw": "end_effector_rotation",
    "robot0_eef_vel_lin_0": "end_effector_velocity",
    "x.vel": "base_velocity",
    "theta.vel": "base_velocity",
    "linear_vel": "base_velocity",
    "base_vx": "base_velocity",
    "base_yaw": "base_position",
    "terminate_episode": "terminate",
    "object_12": "unknown",
    "action_3": "unknown",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kind_follows_from_the_name(name: str, kind: str):
    assert slots_of([name])[0].kind == kind


def test_units_are_told_only_by_the_name():
    assert [s.unit for s in slots_of(["elbow_rad", "elbow_deg", "ee_x_m", "base_vx_mps", "elbow"])] == [
        "rad",
        "deg",
        "m",
        "m/s",
        "",
    ]


def test_names_that_come_twice_get_a_number():
    assert distinct(["a", "a", "b", "a", "a_2"]) == ["a", "a_2", "b", "a_3", "a_2_2"]


def test_align_moves_columns_by_name_and_marks_absent_slots():
    slots = [slot.name for slot in union([slots_of(["x", "gripper"]), slots_of(["yaw", "x"])])]
    assert slots == ["x", "gripper", "yaw"]
    aligned = align(np.array([[1.0, 2.0], [3.0, 4.0]]), ["yaw", "x"], slots)
    np.testing.assert_array_equal(aligned, np.array([[2, np.nan, 1], [4, np.nan, 3]], np.float32))
    assert aligned.dtype == np.float32
    with pytest.raises(ValueError, match="the name 'z'"):
        align(np.zeros((2, 1)), ["z"], slots)
    with pytest.raises(ValueError, match=r"\(2, 2\) for 1 names"):
        align(np.zeros((2, 2)), ["x"], slots)


def test_statistics_equal_numpy_and_leave_out_nan():
    draw = np.random.default_rng(0)
    parts = [draw.normal(1e4, 3, (n, 3)).astype(np.float32) for n in (1, 40, 7, 300)]
    parts[1][::3, 1] = np.nan
    parts[2][:, 1] = np.nan
    parts = [np.concatenate([part, np.full((len(part), 1), np.nan)], 1) for part in parts]
    statistics = Statistics(4)
    for part in parts:
        statistics.update(part)
    found, whole = statistics.summary(), np.concatenate(parts).astype(np.float64)
    for slot in range(3):
        x = whole[:, slot][~np.isnan(whole[:, slot])]
        assert found["count"][slot] == len(x)
        expected = [x.mean(), x.std(), x.min(), x.max(), *np.quantile(x, [0.01, 0.99])]
        np.testing.assert_allclose([found[n][slot] for n in ("mean", "std", "min", "max", "q01", "q99")], expected, rtol=1e-9)
    assert [found[name][3] for name in found] == [None] * 6 + [0]


def test_quantiles_of_a_long_stream_come_from_an_even_draw():
    values = np.linspace(0, 1, 200_000)[:, None]
    statistics = Statistics(1, keep=4096)
    for start in range(0, len(values), 1000):
        statistics.update(values[start : start + 1000])
    found = statistics.summary()
    assert len(statistics._rows) == 4096
    # the standard error of a quantile q of n draws is sqrt(q (1 - q) / n)
    assert found["q01"][0] == pytest.approx(0.01, abs=5 * np.sqrt(0.01 * 0.99 / 4096))
    assert found["q99"][0] == pytest.approx(0.99, abs=5 * np.sqrt(0.01 * 0.99 / 4096))
    assert np.mean(statistics._rows) == pytest.approx(0.5, abs=5 * np.sqrt(1 / 12 / 4096))
    assert found["mean"][0] == pytest.approx(0.5)


STEADY = np.arange(20) / 10


def test_aligned_streams_have_no_faults():
    found = check(20, STEADY, {"front": STEADY + 0.004}, 10)
    assert found.faults == []
    assert found.rate == pytest.approx(10)
    assert found.jitter == pytest.approx(0, abs=1e-9)
    assert found.drift == pytest.approx(4)


@pytest.mark.parametrize(
    ("time", "shown", "fps", "reason"),
    [
        (np.delete(np.arange(21) / 10, 7), {}, 10, "200 ms pass before row 7; expected 100"),
        (np.where(np.arange(20) == 8, 0.7, STEADY), {}, 10, "do not go on at row 8: 0.700 s after 0.700 s"),
        (STEADY[::-1], {}, 10, "do not go on at row 1"),
        (np.where(np.arange(20) == 3, np.nan, STEADY), {}, 10, "missing or not finite"),
        (STEADY, {}, 15, "15 rows per second are declared, 10 measured"),
        (STEADY, {"front": STEADY[:-1]}, 10, "camera front has 19 frames for 20 rows"),
        (None, {"front": np.full(21, np.nan)}, None, "camera front has 21 frames for 20 rows"),
        (STEADY, {"front": STEADY * 1.06}, 10, "camera front is 54 ms off at row 9 and 114 at most; expected 50"),
    ],
)
def test_misaligned_streams_are_named(time: np.ndarray | None, shown: dict[str, np.ndarray], fps: float | None, reason: str):
    assert any(reason in fault for fault in check(20, time, shown, fps).faults), check(20, time, shown, fps).faults


def test_jitter_is_measured_in_milliseconds():
    time = STEADY + np.where(np.arange(20) == 5, 0.02, 0)
    found = check(20, time, {}, 10)
    assert found.faults == []
    assert found.jitter == pytest.approx(20)


def test_rows_take_the_frame_nearest_in_time():
    rows = np.delete(STEADY, 7)
    picked = pick(19, rows, {"front": STEADY + 0.01, "hub": rows}, 0.1)
    np.testing.assert_array_equal(picked.rows, np.arange(19))
    np.testing.assert_array_equal(picked.frames["front"], np.delete(np.arange(20), 7))
    np.testing.assert_array_equal(picked.frames["hub"], np.arange(19))
    late = pick(20, STEADY, {"front": STEADY[3:]}, 0.1)
    np.testing.assert_array_equal(late.rows, np.arange(3, 20))
    np.testing.assert_array_equal(late.frames["front"], np.arange(17))
    blind = pick(20, None, {"front": np.full(18, np.nan)}, 0.1)
    np.testing.assert_array_equal(blind.rows, np.arange(18))
    assert pick(20, STEADY[::-1], {"front": STEADY}, 0.1) is None
    with pytest.raises(ValueError, match="no row has a frame"):
        pick(20, STEADY, {"front": STEADY[:0]}, 0.1)


def rows(values: np.ndarray, state: np.ndarray) -> Rows:
    return Rows({"action": values, "state": state}, STEADY[: len(values)], "go", [], [])


def episode(name: str, action: list[str], values: np.ndarray, split: str = "") -> Episode:
    slots = {"action": slots_of(action), "state": ()}
    read = partial(rows, values, np.zeros((len(values), 0)))
    return Episode(name, slots, read, dict, {}, {}, 10.0, {"robot": name[0]}, split)


def test_episodes_of_different_robots_share_named_slots():
    one, two = np.arange(10.0).reshape(5, 2), np.arange(100.0, 112).reshape(4, 3)
    found = gather("test", [episode("a", ["x", "gripper"], one), episode("b", ["gripper", "x", "yaw"], two)], [])
    assert [slot["name"] for slot in found.header["action"]["slots"]] == ["x", "gripper", "yaw"]
    assert found.header["action"]["count"] == [9, 9, 4]
    assert found.header["action"]["mean"][2] == pytest.approx(two[:, 2].mean())
    assert found.header["action"]["mean"][0] == pytest.approx(np.concatenate([one[:, 0], two[:, 1]]).mean())
    assert found.header["robot"] == "a, b"
    assert "state" not in found.header
    made = pickle.loads(pickle.dumps(found.samples[0].make))()
    assert [*made] == ["action.npy"]
    np.testing.assert_array_equal(array_of(made["action.npy"]), np.c_[one, np.full(5, np.nan)].astype(np.float32))
    assert "action slots: 1 end_effector_position, 1 gripper, 1 end_effector_rotation" in found.report


def test_statistics_are_of_the_training_episodes():
    episodes = [episode("a", ["x"], np.ones((3, 1)), "train"), episode("b", ["x"], np.full((3, 1), 9.0), "test")]
    found = gather("test", episodes, [])
    assert found.header["action"]["mean"] == [1]
    assert [sample.split for sample in found.samples] == ["train", "test"]


def test_infinite_values_and_empty_episodes_are_refused():
    bad = np.ones((3, 1))
    bad[1] = np.inf
    found = gather("test", [episode("a", ["x"], bad), episode("b", ["x"], np.ones((0, 1)))], [])
    assert {skip.source: skip.reason for skip in found.skipped} == {
        "a": "action holds infinite values",
        "b": "the episode has no rows",
    }


def test_cameras_become_extensions():
    assert extensions(["observation.images.Left Wrist"]) == {"observation.images.Left Wrist": "mp4"}
    assert extensions(["observation.images.a.b", "observation.image", "a b"]) == {
        "a b": "a_b.mp4",
        "observation.image": "image.mp4",
        "observation.images.a.b": "a_b_2.mp4",
    }
