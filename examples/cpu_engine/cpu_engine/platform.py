"""vLLM's CPU platform with a Ray resource, a worker that pipelines, and a faster start."""

import os

from vllm.platforms.cpu import CpuPlatform


class MultiHostCpuPlatform(CpuPlatform):
    """Plays one GPU per rank, so that Ray can place ranks on hosts without any."""

    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        start_method = os.environ.get("CPU_ENGINE_START_METHOD", "fork")
        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.worker_cls = "cpu_engine.worker.PipelineCpuWorker"
        # The parent class forces "spawn", which imports everything again in each child; nothing
        # has started a thread yet at this point, so a fork is safe and saves half of the start.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "cpu_engine.communicator.SameMemoryCpuCommunicator"
