"""Each task solved by hand, from its definition, token by token: a solver reads ids alone and says
what is to be said after each of them, None where nothing is asked.

The numbers of tokens are written here again, and nothing of posenc is imported.
"""

from collections.abc import Iterator
from itertools import permutations

Said = list[int | None]


def prompt(ids: list[int], ask: int) -> list[int]:
    """What is between the first token and the one that asks."""
    return ids[1 : ids.index(ask)]


def after(ids: list[int], ask: int, answer: list[int]) -> Said:
    """An answer said from `ask` on, and nothing after it."""
    place = ids.index(ask)
    said: Said = [None] * place + [*answer]
    return said + [None] * (len(ids) - len(said))


def copying(kind: str, symbols: int, ids: list[int]) -> Said:
    ask, following, end = symbols + 1, symbols + 2, symbols + 3
    question = prompt(ids, ask)
    if kind == "rdc":
        assert len(set(question[:-2])) == 1
        assert question[-2] == following
        assert question[-1] != question[0]
        return after(ids, ask, [question[-1]] * (len(question) - 2) + [end])
    if kind in ("rsc", "rsc2x"):
        assert len(set(question)) == 1
    back = list(reversed(question))
    answer = {
        "cmc": question,
        "rsc": question,
        "rsc2x": question + question,
        "cmc2x": [*question, following, *question],
        "mc": back,
        "mc2x": [*back, following, *back],
        "mcrv": [*back, following, *question],
    }[kind]
    return after(ids, ask, [*answer, end])


def addition(ids: list[int]) -> Said:
    plus, equals, end = 11, 12, 13
    question = prompt(ids, equals)
    cut = question.index(plus)
    first, second = question[:cut], question[cut + 1 :]
    assert all(len(digits) == 1 or digits[0] != 0 for digits in (first, second))
    total, carry = [], 0
    for i in range(1, max(len(first), len(second)) + 1):
        carry += sum(digits[-i] for digits in (first, second) if i <= len(digits))
        total.append(carry % 10)
        carry //= 10
    if carry:
        total.append(carry)
    return after(ids, equals, [*reversed(total), end])


def sort(symbols: int, ids: list[int]) -> Said:
    question = prompt(ids, symbols + 1)
    counts = [question.count(symbol) for symbol in range(symbols)]
    answer = [symbol for symbol, count in enumerate(counts) for _ in range(count)]
    return after(ids, symbols + 1, [*answer, symbols + 2])


def sort_numbers(ids: list[int]) -> Said:
    comma, ask, end = 10, 12, 13
    numbers, digits = [], ""
    for token in prompt(ids, ask):
        if token == comma:
            numbers.append(digits)
            digits = ""
        else:
            digits += str(token)
    assert all(10 <= int(number) <= 9999 and number[0] != "0" for number in numbers)
    answer = []
    while numbers:
        least = min(numbers, key=int)
        numbers.remove(least)
        answer += [*map(int, least), comma]
    return after(ids, ask, [*answer, end])


def parity(ids: list[int]) -> Said:
    odd = False
    for bit in prompt(ids, 3):
        odd ^= bit == 1
    return after(ids, 3, [int(odd)])


def recall(pairs: int, vocab_size: int, ids: list[int]) -> Said:
    values = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
    assert len(values) == len(set(values.values())) == pairs
    assert all(key < vocab_size // 2 <= value for key, value in values.items())
    rest = ids[2 * pairs :]
    assert sorted(token for token in rest if token in values) == sorted(values)
    assert all(i % 2 == 0 for i, token in enumerate(rest) if token in values)
    return [None] * (2 * pairs) + [values.get(token) for token in rest]


def selective(copied: int, symbols: int, ids: list[int]) -> Said:
    found = [token for token in ids if token < symbols]
    assert len(found) == copied
    first = ids.index(symbols + 1)
    assert ids[first:] == [symbols + 1] * copied
    return [None] * first + found


def flip_flop(ids: list[int]) -> Said:
    said: Said = []
    memory = None
    for instruction, bit in zip(ids[0::2], [*ids[1::2], None], strict=True):
        assert instruction in (2, 3, 4)
        if instruction == 2:
            memory = bit
        if instruction == 3:
            assert bit in (memory, None)
        said += [memory if instruction == 3 else None, None]
    return said[:-1]


def group(name: str, ids: list[int]) -> Said:
    if name == "z60":
        return [sum(ids[: t + 1]) % 60 for t in range(len(ids))]
    size = int(name[1:])
    own = [p for p in permutations(range(size)) if name[0] == "s" or sign(p) == 1]
    said: Said = []
    images = list(range(size))  # where each point has been sent so far
    for token in ids:
        images = [own[token][x] for x in images]
        said.append(own.index(tuple(images)))
    return said


def sign(p: tuple[int, ...]) -> int:
    """By its cycles: each of even length turns it."""
    left, found = set(range(len(p))), 1
    while left:
        length, x = 0, min(left)
        while x in left:
            left.remove(x)
            x, length = p[x], length + 1
        found *= 1 if length % 2 else -1
    return found


def passkey(ids: list[int]) -> Said:
    text = bytes(ids).decode("latin-1")
    _before, _, rest = text.partition("[The pass key is ")
    number = rest[: rest.index(".]")]
    assert 1 <= int(number) <= 50000
    question = "[What is the pass key? It is ]"
    place = text.rindex(question) + len(question) - 1
    answer = [*map(ord, number), ord(".")]
    return [None] * place + answer + [None] * (len(ids) - place - len(answer))


def tokens(said: Said) -> Iterator[int]:
    """With -100 where nothing is said."""
    return (-100 if token is None else token for token in said)
