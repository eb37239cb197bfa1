"""Make the demo model again: a tiny Llama 3.2 that writes Python, trained on Python's own standard library.

    python tools/train_demo_model.py --out models/demo

Needs torch, transformers and tokenizers; minutes on a data-centre GPU, hours on a CPU. ``--quick`` only shows that
every step works, in seconds. The folder that comes out is a Hugging Face folder; ``training.json`` beside the weights
records what was read, every evaluation, and the hash of every file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_corpus
import demo_tokenizer
import jinja2
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SAMPLE_PROMPTS = [
    "def fibonacci(n):\n",
    "import os\nimport sys\n",
    "class Stack:\n",
    "def read_json(path):\n    ",
]
SAMPLE_QUESTION = "Write a function named flatten."


def llama_config(tokenizer: tokenizers.Tokenizer, num_layers: int) -> dict[str, Any]:
    """``config.json`` with the keys and rotary scaling of Llama 3.2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": demo_tokenizer.stop_ids(tokenizer),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 768,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json`` with the sampling that Llama 3.2's instruct checkpoints ask for."""
    return {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "temperature": 0.6,
        "top_p": 0.9,
    }


def encode_all(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> torch.Tensor:
    """Texts, each between begin and end of text, as one run of ids: ``[tokens]`` int64."""
    begin, end = tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")
    ids: list[int | None] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [begin, *encoding.ids, end]
    return torch.tensor(ids)


def training_texts(files: list[demo_corpus.SourceFile], seed: int) -> list[str]:
    """Whole files, single functions and classes, and conversations, shuffled."""
    rng = random.Random(seed)
    alone, chats = demo_corpus.snippets_and_conversations(files, rng)
    # encode_all puts <|begin_of_text|> in front of every text, so the rendered chat comes without.
    rendered = [render_chat(messages) for messages in chats]
    texts = [file.text for file in files] + alone + rendered
    rng.shuffle(texts)
    return texts


def render_chat(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The tokenizer's own chat template, without begin of text."""
    # As in transformers, the template is compiled with these two flags.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(demo_tokenizer.CHAT_TEMPLATE)
    return template.render(bos_token="", messages=messages, add_generation_prompt=add_generation_prompt)


@torch.no_grad()
def mean_loss(model: Any, ids: torch.Tensor, sequence_length: int) -> float:
    """Mean nats a predicted token, over non-overlapping windows of ``ids [tokens]``."""
    model.eval()
    total, count = 0.0, 0
    for window in ids.split(sequence_length * 32):
        for rows in windows(window, sequence_length):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            count += rows[:, 1:].numel()
    return total / count


def windows(ids: torch.Tensor, sequence_length: int) -> Iterator[torch.Tensor]:
    """``[rows, sequence_length]`` of full windows, then what is left as one row."""
    full = len(ids) // sequence_length * sequence_length
    if full:
        yield ids[:full].view(-1, sequence_length)
    if len(ids) - full > 1:
        yield ids[full:].unsqueeze(0)


def add_dropout(model: Any, probability: float) -> None:
    """Dropout on the embeddings and on both branches of every layer; LlamaForCausalLM has it on attention only."""

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def learning_rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak. ``progress`` runs from 0 to 1."""
    warm = min(1.0, (step + 1) / args.warmup_steps)
    return args.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: Any, train_ids: torch.Tensor, validation_ids: torch.Tensor, args: argparse.Namespace
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The evaluations made on the way, and the weights (fp32) of the best one on the validation files.

    The run ends after ``max_steps`` or ``max_seconds``, whichever comes first; the schedule follows the nearer end.
    """
    device = train_ids.device
    add_dropout(model, args.dropout)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    draws = torch.Generator(device=device).manual_seed(args.seed)
    span = torch.arange(args.sequence_length + 1, device=device)
    evaluations: list[dict[str, float]] = []
    best_loss, best_weights = math.inf, {}
    recent = torch.zeros((), device=device)
    start = time.perf_counter()
    step = 0
    while True:
        progress = min(1.0, max(step / args.max_steps, (time.perf_counter() - start) / args.max_seconds))
        if step and (step % args.eval_steps == 0 or progress == 1.0):
            validation = mean_loss(model, validation_ids, args.sequence_length)
            since = step - (evaluations[-1]["step"] if evaluations else 0)
            evaluations.append(
                {
                    "step": step,
                    "seconds": round(time.perf_counter() - start, 1),
                    "train_loss": round(recent.item() / since, 4),
                    "validation_loss": round(validation, 4),
                }
            )
            print(" ".join(f"{name} {value}" for name, value in evaluations[-1].items()), flush=True)
            recent.zero_()
            if validation < best_loss:
                best_loss = validation
                best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if progress == 1.0:
            return evaluations, best_weights
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, args)
        model.train()
        starts = torch.randint(len(train_ids) - len(span), (args.batch_size, 1), generator=draws, device=device)
        rows = train_ids[starts + span]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        step += 1


def show_samples(model: Any, tokenizer: tokenizers.Tokenizer, max_new_tokens: int) -> None:
    """Print one greedy and one sampled continuation of each sample prompt, and the answer to a question."""
    prompts = ["<|begin_of_text|>" + prompt for prompt in SAMPLE_PROMPTS]
    chat = [{"role": "user", "content": SAMPLE_QUESTION}]
    prompts.append("<|begin_of_text|>" + render_chat(chat, add_generation_prompt=True))
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids], device=model.device)
        for mode in ({"do_sample": False, "temperature": None, "top_p": None}, {"do_sample": True}):
            torch.manual_seed(0)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **mode)[0]
            print(f"----- {mode}\n{tokenizer.decode(out.tolist(), skip_special_tokens=False)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", type=Path, default=demo_corpus.standard_library(), help="folder of Python source")
    parser.add_argument("--source_name", default=f"CPython {platform.python_version()} standard library")
    parser.add_argument("--quick", action="store_true", help="one layer, a few files, a few steps: only a check")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--max_steps", type=int, default=4000)
    parser.add_argument("--max_seconds", type=float, default=3600.0)
    parser.add_argument("--eval_steps", type=int, default=250)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    args = parser.parse_args()
    if args.quick:
        args.num_layers, args.vocab_size = 1, 512
        args.max_steps, args.eval_steps, args.batch_size, args.sequence_length = 4, 2, 2, 64
    return args


def save_folder(model: Any, config: dict[str, Any], tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder: weights in bf16, configs, tokenizer. ``model`` is bf16 afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # transformers 5 writes its own schema; Llama 3.2 is published in this one, and every version reads it.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config(config), indent=2) + "\n")
    demo_tokenizer.save_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def describe_corpus(split: dict[str, list[demo_corpus.SourceFile]]) -> dict[str, Any]:
    """Counts of files and bytes by split, and the hash of everything that was read."""
    return {
        "files": {name: len(group) for name, group in split.items()},
        "bytes": {name: sum(len(file.text.encode()) for file in group) for name, group in split.items()},
        "sha256": demo_corpus.corpus_sha256([file for group in split.values() for file in group]),
    }


def describe_run(args: argparse.Namespace, evaluations: list[dict[str, float]], device: torch.device) -> dict[str, Any]:
    """Settings, versions, and every evaluation made."""
    return {
        "settings": {name: getattr(args, name) for name in vars(args) if name not in ("out", "source", "source_name")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "evaluations": evaluations,
        "steps": int(evaluations[-1]["step"]),
        "seconds": evaluations[-1]["seconds"],
        "validation_loss": min(point["validation_loss"] for point in evaluations),
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the record, which holds them."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "training.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    files = demo_corpus.read_library(args.source)
    if args.quick:
        files = [file for file in files if file.name.startswith(("json/", "html/", "importlib/metadata/"))]
    split = {name: [f for f in files if f.split == name] for name in ("train", "validation", "held_out")}
    tokenizer = demo_tokenizer.train_tokenizer((file.text for file in split["train"]), args.vocab_size)
    device = torch.device(args.device)
    train_ids = encode_all(tokenizer, training_texts(split["train"], args.seed)).to(device)
    validation_ids = encode_all(tokenizer, [file.text for file in split["validation"]]).to(device)
    held_out_ids = encode_all(tokenizer, [file.text for file in split["held_out"]]).to(device)

    config = llama_config(tokenizer, args.num_layers)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.to(device=device, dtype=torch.float32)
    print(f"{len(files)} files, {len(train_ids)} training tokens, {model.num_parameters()} parameters", flush=True)
    evaluations, weights = train(model, train_ids, validation_ids, args)
    model.load_state_dict(weights)
    save_folder(model, config, tokenizer, args.out)

    # The figures are those of the saved bytes, read back, not of the weights in training.
    saved: Any = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    saved.to(device)
    held_out_loss = mean_loss(saved, held_out_ids, args.sequence_length)
    corpus = describe_corpus(split)
    corpus |= {"training_tokens": len(train_ids), "held_out_tokens": len(held_out_ids)}
    figures = {
        "held_out_loss": round(held_out_loss, 4),
        "held_out_perplexity": round(math.exp(held_out_loss), 3),
        "held_out_bits_per_byte": round(
            held_out_loss * len(held_out_ids) / math.log(2) / corpus["bytes"]["held_out"], 4
        ),
    }
    record = {
        "source": args.source_name,
        "corpus": corpus,
        "parameters": model.num_parameters(),
        **describe_run(args, evaluations, device),
        **figures,
        "sha256": file_hashes(args.out),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(figures, flush=True)
    show_samples(saved, tokenizer, 8 if args.quick else 120)


if __name__ == "__main__":
    main()
