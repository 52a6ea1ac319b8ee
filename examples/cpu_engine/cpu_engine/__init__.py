"""A vLLM platform plug-in: the CPU platform, made fit for several hosts.

vLLM asks every `vllm.platform_plugins` entry point for the class to use; see README.md for
what is changed and why.
"""


def platform() -> str:
    """The dotted name of our platform class; vLLM imports it when it needs it."""
    return "cpu_engine.platform.MultiHostCpuPlatform"
