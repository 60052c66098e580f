"""Files in the form of LIBERO's own demonstrations."""

import json
from pathlib import Path

import h5py
import numpy as np

from dtvla.sim.suites import Task

Recording = tuple[np.ndarray, np.ndarray]
"""States (T, 1 + nq + nv) before each action, and actions (T, 7)."""


def write_demo_file(folder: Path, task: Task, recordings: dict[str, Recording]) -> Path:
    """Write ``<task name>_demo.hdf5`` with everything that LIBERO's files hold, pictures of one colour."""
    path = folder / f"{task.name}_demo.hdf5"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        bddl = f"libero/libero/bddl_files/{task.suite}/{task.bddl_file.name}"
        problem = {"problem_name": "libero_tabletop_manipulation", "language_instruction": task.instruction}
        data.attrs["bddl_file_name"] = bddl
        data.attrs["env_args"] = json.dumps({"type": 1, "env_name": problem["problem_name"], "bddl_file": bddl})
        data.attrs["problem_info"] = json.dumps(problem | {"domain_name": "robosuite"})
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"] = len(recordings)
        data.attrs["tag"] = "libero-v1"
        for name, (states, actions) in recordings.items():
            count = len(actions)
            demo = data.create_group(name)
            demo.attrs["init_state"] = states[0]
            demo.attrs["model_file"] = "<mujoco/>"
            demo.attrs["num_samples"] = count
            demo["actions"], demo["states"] = actions, states
            demo["robot_states"] = np.zeros((count, 9))
            demo["rewards"] = demo["dones"] = (np.arange(count) == count - 1).astype(np.uint8)
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{key}"] = np.full((count, 128, 128, 3), 7, np.uint8)
            sizes = {"ee_pos": 3, "ee_ori": 3, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
            for key, size in sizes.items():
                demo[f"obs/{key}"] = np.zeros((count, size))
    return path
