"""Imports: no shadowed package, few dependencies, relative links."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import posenc

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, **variables: str) -> str:
    """Run code in a fresh interpreter from the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
#: Everything that an extra installs, and what torch itself can do without.
OPTIONAL = (
    "datasets", "tokenizers", "triton", "transformers", "safetensors", "tyro", "huggingface_hub",
    "tqdm", "matplotlib", "pyarrow", "pandas", "wandb", "trackio", "tensorboard", "kernels",
    "numpy", "pytest", "onnx", "onnxruntime", "onnxscript",
)  # fmt: skip


def test_library_needs_torch_and_einops_alone() -> None:
    code = BLOCKED.format(names=OPTIONAL) + (
        "import warnings; warnings.simplefilter('ignore')\n"  # torch misses numpy aloud
        "import torch, posenc\n"
        "for name in posenc.names():\n"
        "    module = posenc.attention(name, 24, 4)\n"
        "    module(torch.zeros(1, 3, 24)).sum().backward()\n"
        "    config = posenc.GPTConfig(\n"
        "        vocab_size=9, context=8, layers=1, heads=4, embed_dim=24, attention=name)\n"
        "    posenc.GPT(config).generate(torch.zeros(1, 2, dtype=torch.long), 3)\n"
        f"print(sorted(set(sys.modules) & set({OPTIONAL!r})))"
    )
    assert run(code) == "[]"


def test_importing_the_library_and_its_kernels_imports_no_extra() -> None:
    pytest.importorskip("triton")
    optional = [name for name in OPTIONAL if name not in ("numpy", "triton", "tqdm")]  # torch's
    files = [path.stem for path in (ROOT / "posenc" / "kernels").glob("*.py")]
    code = (
        f"import importlib, sys, posenc; print([n for n in {optional!r} if n in sys.modules])\n"
        f"for name in {files!r}: importlib.import_module('posenc.kernels.' + name)"
    )
    assert run(code, TRITON_INTERPRET="1") == "[]"


def test_kernels_is_a_bare_folder_behind_a_relative_link() -> None:
    link = ROOT / "posenc" / "kernels"
    if not (ROOT / "kernels").exists():
        pytest.skip("an sdist holds the folder in place of the link")
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    listed = subprocess.run(
        ["git", "ls-files", "-s", "posenc/kernels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        assert listed.stdout.startswith("120000")


def test_hugging_face_packages_work_from_the_root() -> None:
    pytest.importorskip("transformers")
    code = (
        "import importlib.util, posenc, torch\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec.origin)\n"  # None for a bare folder: not installed
        "if spec.origin: import kernels; print(kernels.__file__)\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)\n"
        "print(tuple(GPT2LMHeadModel(config)(torch.zeros(1, 3, dtype=torch.long)).logits.shape))"
    )
    origin, *found, shape = run(code).splitlines()
    assert shape == "(1, 3, 11)"
    if found:
        path = Path(found[0])
        assert path == Path(origin)
        assert "site-packages" in path.parts
        assert ROOT not in path.parents
    else:
        assert origin == "None"


def test_version_and_typing_marker() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", posenc.__version__)
    assert (ROOT / "posenc" / "py.typed").is_file()
