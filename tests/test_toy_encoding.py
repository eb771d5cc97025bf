"""An encoding that the library does not have: its class, its row in ZOO and its oracle are enough.

Everything else here are the tests of the others, run over it.
"""

import pytest
import torch
from torch import Tensor, nn

import layer_oracle
import oracles
import posenc
from helpers import HEADS, WIDTH, close, error, perturb, randn, tiny_gpt
from posenc.zoo import ZOO, Recipe
from test_contract import (  # noqa: F401
    test_decoding_in_equal_chunks,
    test_decoding_is_the_full_forward,
    test_every_parameter_reaches_the_loss,
    test_full_caches_and_other_batches_are_refused,
    test_gradient_to_later_tokens_is_zero,
    test_gradients_are_those_of_finite_differences,
    test_implementations_agree_past_one_block,
    test_left_padding_changes_no_row,
    test_meta_initialisation_equals_a_direct_one,
    test_odd_shapes_give_finite_outputs_and_gradients,
    test_positions_with_gaps_follow_the_oracle,
    test_ragged_rows_decode_on_without_positions,
    test_relative_methods_ignore_a_shift_of_all_positions,
    test_rows_of_a_batch_do_not_meet,
    test_state_dict_holds_parameters_alone_and_returns,
)
from test_features import (  # noqa: F401
    test_back_ends_agree_or_refuse,
    test_cache_of_a_window_is_no_longer_than_it,
    test_documents_do_not_meet,
    test_groups_are_repeated_key_heads,
    test_later_tokens_change_nothing_before_them,
    test_layer_is_its_oracle,
    test_left_padding_is_that_of_negative_positions,
    test_masks_and_segments_that_divide_nothing,
    test_packed_documents_are_documents_alone,
    test_padded_rows_are_rows_alone,
    test_reordered_rows_decode_on,
    test_rows_of_padding_alone_stay_finite,
    test_windows_from_the_token_itself_to_everything,
)
from test_features import test_decoding_is_the_full_forward as test_decoding_with_features  # noqa: F401

pytestmark = pytest.mark.parametrize("name", ["toy"])


class Toy(posenc.Encoding):
    """score[m, n] = q[m].k[n] / sqrt(D) - slope_h |m - n|, slopes learned, one a query head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slope)

    def score_bias(self, positions: Tensor, key_positions: Tensor) -> Tensor:
        """(1, H, T, S), or (B, H, T, S) for positions of rows."""
        apart = (positions.unsqueeze(-1) - key_positions.unsqueeze(-2)).abs()
        if apart.ndim == 2:
            apart = apart.unsqueeze(0)
        return -self.slope[:, None, None] * apart.unsqueeze(1)


def toy_scores(call: layer_oracle.Call) -> Tensor:
    """The toy's formula, pair by pair."""
    slope, positions = call.weights["slope"], call.tokens.positions.tolist()

    def bias(row: list[int]) -> Tensor:
        pairs = [torch.stack([slope * abs(m - n) for n in row], -1) for m in row]
        return torch.stack(pairs, -2)

    return oracles.dot_scores(call.q, call.k) - torch.stack([bias(row) for row in positions])


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    recipe = Recipe(paper="none", acts="logits", summary="falls with distance", encoding=Toy)
    monkeypatch.setitem(ZOO, "toy", recipe)
    monkeypatch.setitem(layer_oracle.SCORES, "Toy", toy_scores)


def test_one_row_makes_a_name(name: str) -> None:
    assert name in posenc.names()
    module = posenc.attention(name, WIDTH, HEADS)
    assert isinstance(module.encoding, Toy)
    with pytest.raises(ValueError, match="Did you mean 'toy'"):
        posenc.attention("toyy", WIDTH, HEADS)


def test_bias_is_what_the_layer_adds(name: str) -> None:
    toy = perturb(Toy(HEADS)).double()
    bias = toy.score_bias(torch.arange(3), torch.arange(5))
    assert bias.shape == (1, HEADS, 3, 5)
    close(bias[0, :, 2, 4], -2 * toy.slope)
    rows = toy.score_bias(torch.arange(3).expand(2, 3), torch.stack([torch.arange(5)] * 2))
    assert rows.shape == (2, HEADS, 3, 5)
    close(rows, bias.expand(2, -1, -1, -1))
    # one query whose projections are zero: the bias alone weighs the values
    module = posenc.attention(name, WIDTH, HEADS).double()
    perturb(module.encoding)
    x = randn(1, 5, WIDTH)
    with torch.no_grad():
        module.c_attn.weight[:WIDTH] = 0
    weights = module.encoding.score_bias(torch.tensor([4]), torch.arange(5)).softmax(-1)
    v = (x @ module.c_attn.weight[-WIDTH:].T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = (weights @ v).transpose(1, 2).flatten(2) @ module.c_proj.weight.T
    assert error(module(x)[:, -1:], expected) <= 1e-10


def test_models_pack_and_pad_it(name: str) -> None:
    gpt, ids = tiny_gpt(name), torch.randint(29, (1, 9))
    packed = gpt(ids, segments=posenc.segments([4, 5])).logits
    close(packed[:, :4], gpt(ids[:, :4]).logits)
    close(packed[:, 4:], gpt(ids[:, 4:]).logits)
    mask = torch.arange(9)[None] >= 3
    close(gpt(ids, mask=mask).logits[:, 3:], gpt(ids[:, 3:]).logits)
    mixed = tiny_gpt((f"{name}:window=3", "nope"))
    assert isinstance(mixed.h[0].attn.encoding, Toy)
    close(mixed(ids, mask=mask).logits[:, 3:], mixed(ids[:, 3:]).logits)
