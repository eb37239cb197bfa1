"""Offline inference for Llama 3, from scratch: a PyTorch model over custom CUDA kernels."""

from llama3.errors import UserError
from llama3.llm import LLM
from llama3.outputs import CompletionOutput, Logprob, RequestOutput
from llama3.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "UserError"]
