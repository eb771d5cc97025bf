"""The trained model as a plain GPT, whatever held its weights, and a sample of its text."""

from dataclasses import replace

import torch

from posenc.data import Tokenizer
from posenc.models.gpt import GPT
from posenc.training.parallel import Parallel, whole


def plain_model(model: GPT, parallel: Parallel) -> GPT | None:
    """A copy on rank 0 without sharding or compilation (None elsewhere); all ranks must ask."""
    state = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if parallel.is_main:
            state[name] = gathered.detach().clone()
    if not parallel.is_main:
        return None
    # The back end is a choice of this machine, not a property of the model.
    options = {key: value for key, value in model.config.attention_options.items() if key != "impl"}
    with torch.device("meta"):
        plain = GPT(replace(model.config, attention_options=options))
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(True).eval()


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: list[int], length: int, seed: int) -> str:
    """The ids of a prompt and `length` tokens that the model continues them with, as one text."""
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    written = model.generate(ids, length, temperature=0.8, top_k=50, generator=generator)
    return tokenizer.decode(written[0].tolist())
