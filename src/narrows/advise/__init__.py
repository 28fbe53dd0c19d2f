"""What to run in SGLang, vLLM or TensorRT-LLM: the best deployment that the engine can have, as its command line."""
