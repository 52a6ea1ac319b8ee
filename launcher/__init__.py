"""launcher: brings up large language models over several GPU machines and keeps them up."""

__version__ = "0.1.0"
