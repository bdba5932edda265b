"""Tokenizers: the one that is built, the way all are loaded, and the arrays that a model gets."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data import tokenizers
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.errors import UserError

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 160
TEXTS = [
    *toy_prompts(20, seed=1),
    "",
    "   ",
    "A Ｆｕｌｌ-width ﬁsh\t① café \n unseen: 漢字 <pad> </s> end",
    "word " * 200,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer_3"
    tokenizers.build_unigram_tokenizer(toy_prompts(300), VOCAB_SIZE, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.load_tokenizer(folder)


def public_call(tokenizer, text, length):
    """The call of the public text encoders."""
    return tokenizer(text, padding="max_length", max_length=length, truncation=True, add_special_tokens=True)


def test_special_ids_are_those_of_t5(folder, tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= VOCAB_SIZE
    assert sorted(path.name for path in folder.iterdir()) == ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    assert tokenizer("漢").input_ids[-2:] == [2, 1]
    assert max(max(tokenizer(text).input_ids) for text in TEXTS) < len(tokenizer)


def test_public_class_loads_it_to_the_same_tokens(folder, tokenizer):
    from transformers import T5Tokenizer

    public = T5Tokenizer.from_pretrained(folder)
    assert type(tokenizer) is type(public)
    for text in TEXTS:
        assert public_call(tokenizer, text, 32) == public_call(public, text, 32)


def test_sentencepiece_model_beside_it_agrees(folder, tokenizer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for text in TEXTS:
        if "<pad>" not in text:  # SentencePiece takes control symbols for plain text, a tokenizer does not
            assert tokenizer(text).input_ids == [*model.encode(text), 1]


def test_it_learns_pieces_and_decodes_to_the_text(tokenizer):
    texts = toy_prompts(20, seed=2)
    encoded = [tokenizer(text).input_ids for text in texts]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts
    # Letter by letter would be one token a character.
    assert sum(map(len, encoded)) < 0.6 * sum(map(len, texts))


def test_same_prompts_give_the_same_bytes_in_another_process(folder, tmp_path):
    again = tmp_path / "again"
    code = (
        "import sys; from nd_jax.data import tokenizers; from nd_jax.data.toy_prompts import toy_prompts\n"
        f"print(tokenizers.build_unigram_tokenizer(toy_prompts(300), {VOCAB_SIZE}, sys.argv[1]))"
    )
    # Another hash seed: nothing may depend on the order of a set or a dictionary of strings.
    done = subprocess.run(
        [sys.executable, "-c", code, str(again)],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == len(tokenizers.load_tokenizer(folder))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("length", [2, 7, 32, 128])
def test_tokenize_equals_the_public_call(tokenizer, length):
    tokenize = tokenizers.Tokenize(tokenizer, length)
    for text in TEXTS:
        expected = public_call(tokenizer, text, length)
        got = tokenize(text)
        assert got.keys() == {"ids", "mask"}
        for name, key in (("ids", "input_ids"), ("mask", "attention_mask")):
            assert got[name].dtype == np.int32 and got[name].shape == (length,)
            assert got[name].tolist() == expected[key]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_layout_of_any_text(tokenizer, text):
    got = tokenizers.Tokenize(tokenizer, 16)(text)
    count = int(got["mask"].sum())
    assert count >= 1
    assert got["mask"].tolist() == [1] * count + [0] * (16 - count)
    assert got["ids"][count - 1] == 1
    assert not got["ids"][count:].any()
    assert got["ids"].tolist() == public_call(tokenizer, text, 16)["input_ids"]


def test_tokenize_has_its_own_settings_in_threads(tokenizer):
    """Two lengths at once, while the tokenizer that they came from is used with a third."""
    tokenize = {length: tokenizers.Tokenize(tokenizer, length) for length in (8, 24)}
    expected = {length: [tokenize[length](text)["ids"] for text in TEXTS] for length in tokenize}
    wrong = []

    def work(length):
        for _ in range(30):
            for text, ids in zip(TEXTS, expected[length], strict=True):
                if not np.array_equal(tokenize[length](text)["ids"], ids):
                    wrong.append((length, text))

    threads = [threading.Thread(target=work, args=(length,)) for length in (8, 24, 8, 24)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        assert len(public_call(tokenizer, "a cat", 5)["input_ids"]) == 5
    for thread in threads:
        thread.join()
    assert wrong == []


def test_clip_tokenizer_in_the_released_layout(tmp_path):
    """`tokenizer` and `tokenizer_2` have vocab.json and merges.txt, a begin token, and pad with the end token."""
    from transformers import CLIPTokenizer

    vocab = {token: i for i, token in enumerate(["a", "c", "t", "a</w>", "t</w>", "ca", "cat</w>", "<|startoftext|>"])}
    vocab["<|endoftext|>"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    got = tokenizers.Tokenize(tokenizers.load_tokenizer(tmp_path), 6)("a cat")
    assert got["ids"].tolist() == [7, 3, 6, 8, 8, 8]
    assert got["mask"].tolist() == [1, 1, 1, 1, 0, 0]
    public = public_call(CLIPTokenizer.from_pretrained(tmp_path), "a cat", 6)
    assert got["ids"].tolist() == public["input_ids"]


def test_tokenize_rejects_lengths_without_room(tokenizer):
    for length in (-1, 0, 1):
        with pytest.raises(UserError, match=f"max_length {length} has no room"):
            tokenizers.Tokenize(tokenizer, length)


def load_error(folder) -> str:
    with pytest.raises(UserError) as caught:
        tokenizers.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_hold_no_tokenizer(folder, tmp_path):
    assert "no such tokenizer folder" in load_error(tmp_path / "missing")
    assert "name its subfolder tokenizer_3" in load_error(folder.parent)
    assert "is incomplete" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", None, "is incomplete"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is not valid JSON"),
        ("tokenizer.json", b'{"version": "1.0"', "tokenizer.json: is not valid JSON"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unigram"}}', "does not load"),
    ],
)
def test_damaged_tokenizer_folder(folder, tmp_path, name, content, message):
    damaged = tmp_path / "tokenizer_3"
    shutil.copytree(folder, damaged)
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content)
    assert message in load_error(damaged)


def test_a_vocabulary_that_is_missing_is_not_made_up(folder, tmp_path):
    damaged = tmp_path / "tokenizer_3"
    shutil.copytree(folder, damaged)
    (damaged / "tokenizer.json").unlink()
    assert len(tokenizers.load_tokenizer(damaged)) == len(tokenizers.load_tokenizer(folder))
    (damaged / "spiece.model").unlink()
    assert "is incomplete" in load_error(damaged)


def test_code_in_a_tokenizer_folder_is_not_run(folder, tmp_path):
    hostile = tmp_path / "tokenizer_3"
    shutil.copytree(folder, hostile)
    marker = tmp_path / "ran"
    (hostile / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (hostile / "tokenizer_config.json").write_text(json.dumps(config))
    assert "does not load" in load_error(hostile)
    assert not marker.exists()


def test_building_fails_without_leaving_a_folder(tmp_path, folder):
    out = tmp_path / "tokenizer_3"
    for prompts, size, message in [
        ([], 100, "no prompts"),
        (["abcdefgh"], 5, "vocab_size 5"),
        (["cat"], -1, "vocab_size"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            tokenizers.build_unigram_tokenizer(prompts, size, out)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="exists already"):
        tokenizers.build_unigram_tokenizer(["a cat"], 100, folder)


def test_little_text_gives_a_small_vocabulary(tmp_path):
    size = tokenizers.build_unigram_tokenizer(["a cat"], 1000, tmp_path / "t")
    assert 3 < size < 20
    assert len(tokenizers.load_tokenizer(tmp_path / "t")) == size
