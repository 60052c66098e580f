"""Run plain LIBERO, as its users do: ``python plain_libero.py SUITE TASK INIT SIZE ACTIONS OUT``.

Nothing of dtvla is imported: this is the reference that dtvla's environment is compared with.
"""

import os
import sys

import numpy as np


def main(suite: str, task_id: int, init_state: int, size: int, actions: str, out: str) -> None:
    """Write states, pictures and proprioception of every step to ``out``."""
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    tasks = benchmark.get_benchmark(suite)()
    env = OffScreenRenderEnv(
        bddl_file_name=tasks.get_task_bddl_file_path(task_id), camera_heights=size, camera_widths=size
    )
    env.seed(0)
    env.reset()
    observation = env.set_init_state(tasks.get_task_init_states(task_id)[init_state])
    for _ in range(10):
        observation, *_ = env.step([0.0] * 6 + [-1.0])
    states, agentview, wrist, proprioception = [], [], [], []
    for action in [None, *np.load(actions)]:
        if action is not None:
            observation, *_ = env.step(action)
        states.append(env.get_sim_state())
        agentview.append(observation["agentview_image"][::-1, ::-1])
        wrist.append(observation["robot0_eye_in_hand_image"][::-1, ::-1])
        pose = [observation["robot0_eef_pos"], quat2axisangle(observation["robot0_eef_quat"])]
        proprioception.append(np.concatenate([*pose, observation["robot0_gripper_qpos"]]).astype(np.float32))
    np.savez(out, states=states, agentview=agentview, wrist=wrist, state=proprioception)
    sys.stdout.flush()
    os._exit(0)  # the destructors of its OpenGL context print errors


if __name__ == "__main__":
    suite_name, task, init, pixels, actions_file, out_file = sys.argv[1:]
    main(suite_name, int(task), int(init), int(pixels), actions_file, out_file)
