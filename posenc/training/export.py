"""The trained model as a plain GPT, whatever held its weights, and a sample of its text."""

import torch

from posenc.data import Tokenizer
from posenc.models.checkpoints import with_impl
from posenc.models.gpt import GPT
from posenc.training.parallel import Parallel, whole
from posenc.wrappers import plain_name


def plain_model(model: GPT, parallel: Parallel) -> GPT | None:
    """A copy on rank 0 without sharding or compilation (None elsewhere); all ranks must ask."""
    state = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if parallel.is_main:
            state[plain_name(name)] = gathered.detach().clone()
    if not parallel.is_main:
        return None
    with torch.device("meta"):
        plain = GPT(with_impl(model.config))
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: list[int], length: int, seed: int) -> str:
    """The ids of a prompt and `length` tokens that the model continues them with, as one text.

    It ends before that with the tokenizer's end of text, where the model draws one.
    """
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    written = model.generate(
        ids, length, temperature=0.8, top_k=50, stop=tokenizer.end_of_text, generator=generator
    )
    return tokenizer.decode(written[0].tolist())
