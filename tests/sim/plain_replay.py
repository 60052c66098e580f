"""Regenerate a recording with plain LIBERO, as the field does: ``python plain_replay.py FILE DEMO BDDL SIZE OUT``.

Nothing of dtvla is imported: this is the reference that imported demonstrations are compared with.
"""

import os
import sys

import h5py
import numpy as np


def main(path: str, demo: str, bddl: str, size: int, out: str) -> None:
    """Write what is seen before every action that is not a no-op, that action, and success after the last."""
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    with h5py.File(path) as file:
        first_state, recorded = file[f"data/{demo}/states"][0], file[f"data/{demo}/actions"][:]
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=size, camera_widths=size)
    env.seed(0)
    env.reset()
    observation = env.set_init_state(first_state)
    for _ in range(10):
        observation, *_ = env.step([0.0] * 6 + [-1.0])
    agentview, wrist, proprioception, actions, done = [], [], [], [], False
    for action in recorded:
        still = np.linalg.norm(action[:6]) < 1e-4
        if still and (not actions or actions[-1][6] == action[6]):
            continue
        pose = [observation["robot0_eef_pos"], quat2axisangle(observation["robot0_eef_quat"])]
        proprioception.append(np.concatenate([*pose, observation["robot0_gripper_qpos"]]).astype(np.float32))
        agentview.append(observation["agentview_image"][::-1, ::-1])
        wrist.append(observation["robot0_eye_in_hand_image"][::-1, ::-1])
        actions.append(action)
        observation, _, done, _ = env.step(action)
    np.savez(out, agentview=agentview, wrist=wrist, state=proprioception, action=actions, success=done)
    sys.stdout.flush()
    os._exit(0)  # the destructors of its OpenGL context print errors


if __name__ == "__main__":
    hdf5_file, name, bddl_file, pixels, out_file = sys.argv[1:]
    main(hdf5_file, name, bddl_file, int(pixels), out_file)
