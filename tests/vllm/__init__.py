"""`make test-vllm`: recursive models written here with what they must say, and served by vLLM in an environment of its own."""
