"""A small engine that speaks vLLM's and Ray's command lines and HTTP, for tests that are not about
the engine. It refuses every argument that it was not told about."""
