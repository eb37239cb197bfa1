"""Whole-model benchmarks: the same cases on this engine, vLLM and transformers, each in a process of its own."""
