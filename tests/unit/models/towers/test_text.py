"""Pretrained text towers, through a small BERT that transformers itself saves: real weights in, every one of them, and
trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast
from transformers.models.bert_japanese.tokenization_bert_japanese import BertJapaneseTokenizer

from htcl_ray.cluster import connection
from htcl_ray.config import Config
from htcl_ray.config.sections import TextSettings
from htcl_ray.errors import ConfigError, InputError, MismatchError, WorkspaceError
from htcl_ray.losses.stages import pretrain_terms
from htcl_ray.models import HTCL
from htcl_ray.models.towers.text import (
    TextEncoder,
    check_song_texts,
    check_text_settings,
    fast_tokenizer,
    text_encoder_from_name,
    transformer_from_config,
)
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.pipelines.train import pretrain
from htcl_ray.training.batches import Batch
from htcl_ray.training.health import distinct_texts, refuse_equal_texts
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.optimization import build_optimizer
from htcl_ray.training.song_numbers import Songs
from htcl_ray.training.stage_tasks import Task
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.unit
TEXTS = ["calm piano", "fast technos calm"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as transformers itself saves it."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "calm", "piano", "techno", "fast", "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=10,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    BertModel(bert).save_pretrained(folder)
    return folder


@pytest.fixture
def config(bert_folder: Path, tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "workspace", **{"text.name_or_path": str(bert_folder), "text.max_tokens": 16})


def without(folder: Path, to: Path, part: str) -> Path:
    """A copy of a model folder that lacks the weights whose names start with `part`."""
    shutil.copytree(folder, to)
    weights = {
        name: tensor for name, tensor in load_file(to / "model.safetensors").items() if not name.startswith(part)
    }
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_pretrained_tower_gives_berts_own_numbers(config: Config, bert_folder: Path, tmp_path: Path, pooling: str):
    """Padded together by us, one by one without padding by transformers."""
    model = HTCL.untrained(config.with_overrides({"text.pooling": pooling}))
    reference, tokenizer = BertModel.from_pretrained(bert_folder).eval(), BertTokenizerFast.from_pretrained(bert_folder)
    with torch.no_grad():
        outputs = [reference(**tokenizer(text, return_tensors="pt")) for text in TEXTS]
        pooled = {
            "pooler": [output.pooler_output[0] for output in outputs],
            "cls": [output.last_hidden_state[0, 0] for output in outputs],
            "mean": [output.last_hidden_state[0].mean(dim=0) for output in outputs],
        }
        torch.testing.assert_close(
            model.eval().text_encoder(model.text_encoder.tokenize(TEXTS)), torch.stack(pooled[pooling])
        )
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(HTCL.from_pretrained(tmp_path / "model").embed_text(TEXTS), model.embed_text(TEXTS))


def test_every_weight_is_the_files_and_training_moves_it(config: Config, bert_folder: Path, tmp_path: Path):
    """And a checkpoint stands alone: it is read when the folder of the pretrained model is gone."""
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    model = HTCL.untrained(config.with_overrides({"text.name_or_path": str(folder)}))
    given, loaded = load_file(folder / "model.safetensors"), model.text_encoder.transformer.state_dict()
    assert set(given) == set(loaded)
    assert all(torch.equal(given[name], loaded[name]) for name in given)
    drawn = transformer_from_config(model.text_encoder.record.transformer).state_dict()
    matrices = [name for name in given if given[name].ndim == 2]
    assert matrices
    assert not any(torch.equal(drawn[name], given[name]) for name in matrices)

    mel = torch.randn(4, 24, config.audio.n_mels, generator=torch.Generator().manual_seed(0))
    tokens = model.text_encoder.tokenize(["calm piano", "fast techno", "piano", "fast technos calm"])
    batch = Batch(mel, torch.full((4,), 24), tokens, torch.arange(12).reshape(4, 3))
    optimizer = build_optimizer(model.train(), config.pretrain)
    task = Task(
        "pretrain", 4, 1, order=lambda epoch: torch.arange(4).numpy(), terms=pretrain_terms, weights={"text": 1.0}
    )
    compute_gradients(model, batch, task)
    optimizer.step()
    moved = model.text_encoder.transformer.state_dict()
    assert not any(torch.equal(moved[name], given[name]) for name in matrices)

    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(folder)
    again = HTCL.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again.embed_text(TEXTS), model.embed_text(TEXTS))


def test_weights_are_never_drawn_in_silence(bert_folder: Path, tmp_path: Path):
    headless = without(bert_folder, tmp_path / "headless", "pooler.")
    with pytest.raises(
        ConfigError, match=r"no weights for its pooler, but text\.pooling is pooler; set text\.pooling=mean"
    ):
        check_text_settings(TextSettings(name_or_path=str(headless), max_tokens=16))
    tower = text_encoder_from_name(TextSettings(name_or_path=str(headless), max_tokens=16, pooling="mean"))
    assert set(tower.transformer.state_dict()) == set(load_file(headless / "model.safetensors"))
    shallow = without(bert_folder, tmp_path / "shallow", "encoder.layer.1.")
    with pytest.raises(ConfigError, match=r"no weights for encoder\.layer\.1\..* and 15 others; expected all of them"):
        check_text_settings(TextSettings(name_or_path=str(shallow), max_tokens=16, pooling="mean"))


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN or infinity"), (0.0, "nothing but zeros")])
def test_text_models_with_damaged_weights_are_refused(bert_folder: Path, tmp_path: Path, value: float, message: str):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"].fill_(value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MismatchError,
        match=rf"the text model '{folder}' holds {message} under encoder\.layer\.0\.output\.dense\.weight",
    ):
        check_text_settings(TextSettings(name_or_path=str(folder), max_tokens=16))


def test_unusable_text_models_are_refused(bert_folder: Path, tmp_path: Path):
    for name, message in (
        (str(tmp_path), "cannot be loaded"),
        (str(bert_folder), "max_tokens is 99, .* takes at most 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_text_settings(TextSettings(name_or_path=name, max_tokens=99))


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def only_its_settings(folder: Path) -> None:
    no_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def vocabulary(*tokens: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        only_its_settings(folder)
        (folder / "vocab.txt").write_text("\n".join(tokens))

    return write


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(tree | values))

    return write


def garbage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text('{"version": "1.0", "model": {"type": "none"}}') and None


SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DAMAGES = {
    "no tokenizer": (no_tokenizer, r"the tokenizer of the text model '.*' has no vocabulary, only 5 special tokens"),
    "only its settings": (only_its_settings, "has no vocabulary, only 5 special tokens"),
    "an empty vocabulary": (vocabulary(), "has no vocabulary, only 5 special tokens"),
    "special tokens alone": (vocabulary(*SPECIALS), "has no vocabulary, only 5 special tokens"),
    "no [UNK] in the vocabulary": (
        vocabulary("calm", "piano"),
        r"cannot tokenize texts \(WordPiece error: Missing \[UNK\] token",
    ),
    "capital words, lower-cased texts": (
        vocabulary(*SPECIALS, "CALM", "PIANO", "FAST"),
        r"does not recognise its own vocabulary: every text becomes '\[UNK\]'",
    ),
    "too large a vocabulary": (
        vocabulary(*SPECIALS, "calm", "piano", "a", "b", "c", "d"),
        "has 11 tokens, but the text tower knows 10, so they do not belong together",
    ),
    "another model's vocabulary": (changed("config.json", vocab_size=400), "cannot be loaded"),
    "another padding id": (
        changed("config.json", pad_token_id=3),
        "has pad_token_id 0, but the text tower's configuration says 3",
    ),
    "no padding token": (changed("tokenizer_config.json", pad_token=None), "no padding token"),
    "a damaged tokenizer": (garbage("tokenizer.json"), "cannot be loaded"),
    "damaged weights": (garbage("model.safetensors"), "cannot be loaded"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_text_model_without_a_usable_tokenizer_is_refused(bert_folder: Path, tmp_path: Path, damage: str):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(InputError, match=message):
        check_text_settings(TextSettings(name_or_path=str(folder), max_tokens=16))


@pytest.mark.parametrize(
    "damage", ["no tokenizer", "capital words, lower-cased texts", "too large a vocabulary", "a damaged tokenizer"]
)
def test_a_model_folder_with_a_damaged_tokenizer_is_refused(config: Config, tmp_path: Path, damage: str):
    HTCL.untrained(config).save_pretrained(tmp_path / "model")
    assert len(HTCL.from_pretrained(tmp_path / "model").embed_text(TEXTS)) == 2
    DAMAGES[damage][0](tmp_path / "model/tokenizer")
    with pytest.raises((MismatchError, WorkspaceError), match="tokenizer"):
        HTCL.from_pretrained(tmp_path / "model")


def test_pretrain_is_refused_before_ray_starts(
    config: Config, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Case 09: only config.json and model.safetensors of a text model were copied."""
    monkeypatch.setattr(connection, "connect", lambda _: pytest.fail("pretrain connected to Ray"))
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    no_tokenizer(folder)
    write_features(config)
    with pytest.raises(
        MismatchError,
        match="has no vocabulary, only 5 special tokens, so its files are missing; copy the tokenizer's files",
    ):
        pretrain(config.with_overrides({"text.name_or_path": str(folder)}))
    with pytest.raises(
        ConfigError,
        match=r"of the tokens of the song texts are unknown to the tokenizer, for instance in 'jazz song number 0'",
    ):
        pretrain(config)
    with pytest.raises(
        ConfigError,
        match=r"36 different song texts become only \d different .*: raise text\.max_tokens \(3\), .*vocab_size",
    ):
        pretrain(config.with_overrides({"text.name_or_path": None, "text.max_tokens": 3}))


def test_ids_that_a_configuration_does_not_state_are_the_tokenizers(bert_folder: Path, tmp_path: Path):
    """As paraphrase-multilingual-MiniLM-L12-v2: a BertConfig with its default padding id, and a tokenizer with
    another."""
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    vocabulary("[CLS]", "[PAD]", "[SEP]", "[UNK]", "calm", "piano", "techno", "fast", "##s", "[MASK]")(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 1
    check_text_settings(TextSettings(name_or_path=str(folder), max_tokens=16))


def test_texts_that_a_tokenizer_cannot_tell_apart_are_refused(bert_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    settings = TextSettings(name_or_path=str(bert_folder), max_tokens=16)
    check_song_texts(tokenizer, ["calm piano", "calm techno", "fast drums"], settings)
    with pytest.raises(ConfigError, match=r"80% of the tokens .* are unknown .* choose another text\.name_or_path"):
        check_song_texts(tokenizer, ["angry drums", "loud drums calm"], settings)
    check_song_texts(tokenizer, ["calm piano calm", "calm piano fast"], settings)
    with pytest.raises(ConfigError, match=r"^3 different song texts become only 1 .* raise text\.max_tokens \(4\)"):
        check_song_texts(
            tokenizer,
            ["calm piano", "calm piano fast", "calm piano techno"],
            settings.model_copy(update={"max_tokens": 4}),
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (0.0, "embeds 2 different song texts alike, for instance 'calm piano' and 'fast technos calm'"),
        (float("nan"), "the stage-1 model gives input 0 a vector that is not finite"),
    ],
)
def test_training_does_not_begin_when_every_text_is_one_vector(config: Config, fault: float, message: str):
    model = HTCL.untrained(config)
    ids = np.arange(2).repeat(3).reshape(2, 3)
    songs = Songs(["a", "b"], TEXTS, ids, train=np.arange(2), validation=np.arange(0))
    assert distinct_texts(songs) == TEXTS
    refuse_equal_texts(model, songs)
    with torch.no_grad():
        model.text_head[-1].weight.fill_(fault)
    with pytest.raises(InputError, match=message):
        refuse_equal_texts(model, songs)
    refuse_equal_texts(model, Songs(["a", "b"], ["calm", "calm"], ids * 0, train=np.arange(2), validation=np.arange(0)))


PIECES = (
    "calm",
    "piano",
    "wave",
    "##s",
    "##wave",
    "syn",
    "##th",
    "a",
    "&",
    "r",
    "b",
    "z",
    "##z",
    "q",
    "##q",
    "静",
    "か",
    "##な",
    "##ヒ",
)


def knowing(tokenizer: object, max_tokens: int = 16) -> TextEncoder:
    """A text tower whose weights are never used."""
    return TextEncoder(torch.nn.Identity(), tokenizer, TextSettings(max_tokens=max_tokens, pooling="mean"))


def word_pieces(folder: Path) -> str:
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]), encoding="utf-8"
    )
    return str(folder / "vocab.txt")


@pytest.mark.parametrize(
    ("text", "known", "of"),
    [
        ("calm piano", 9, 9),
        ("Cálm, PIANO!", 9, 9),  # punctuation counts for nothing
        ("calm jazz", 4, 8),  # jazz is [UNK]
        ("calms", 4, 5),  # calm ##s
        ("synthwaves", 9, 10),  # syn ##th ##wave ##s
        ("zzzqqq", 0, 6),  # spelled out
        ("zzzqqq calm", 4, 10),
        ("a", 1, 1),  # a whole word, however short
        ("R&B", 2, 2),
        ("!!! &", 0, 0),
        (" \t\u200b", 0, 0),
        ("\U0001f3b5\U0001f3b6", 0, 2),
        ("[MASK] [UNK] [SEP]", 0, 10),
        ("静かな calm", 7, 7),  # one character is a word or a syllable
        ("かなピ", 3, 3),
        ("かな静", 3, 3),
        ("モ", 0, 1),
        ("موسيقى", 0, 6),
        ("piano" * 30, 0, 150),  # longer than any word
        ("calm " * 14 + "zzz", 56, 56),  # the model does not read on
        ("zq " * 20 + "calm " * 90, 0, 14),
    ],
)
def test_coverage_is_the_share_of_characters_that_the_vocabulary_knows(tmp_path: Path, text: str, known: int, of: int):
    encoder = knowing(BertTokenizerFast(word_pieces(tmp_path)))
    assert encoder.coverage([text]) == pytest.approx([known / of if of else 0])
    together = encoder.coverage(["calm piano", text, ""])
    assert together == pytest.approx([1, known / of if of else 0, 0])


def test_coverage_by_bytes_knows_no_part_of_a_character(tmp_path: Path):
    """A vocabulary of bytes has no [UNK]: an emoji and a syllable are several pieces each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {
        letter: number
        for number, letter in enumerate(
            ["<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca", "lm", "calm"]
        )
    }
    tokenizer = Tokenizer(models.BPE(alphabet, [("c", "a"), ("l", "m"), ("ca", "lm")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = knowing(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"), max_tokens=64
    )
    assert encoder.coverage(["calm", "\U0001f3b5", "かな", "calmzz"]) == pytest.approx([1, 0, 0, 4 / 6])


def test_coverage_of_a_tokenizer_without_offsets_is_the_share_of_its_tokens(tmp_path: Path):
    slow = BertJapaneseTokenizer(word_pieces(tmp_path), word_tokenizer_type="basic", do_lower_case=True)
    assert not slow.is_fast
    assert knowing(slow).coverage(["calm piano", "calm jazz", "jazz", ""]) == pytest.approx([1, 0.5, 0, 0])


def test_a_vocabulary_from_scratch_knows_its_catalogue_and_no_other_script():
    """Texts of shared/faults/37-unknown-script, against a vocabulary that knows every letter of them that is Latin."""
    catalogue = [
        f"{mood} {genre} with {instrument}"
        for mood in ("calm", "quick")
        for genre in ("jazz", "folk")
        for instrument in ("piano", "harp")
    ]
    encoder = knowing(fast_tokenizer(train_wordpiece(catalogue * 3, 200)))
    assert encoder.coverage(catalogue).tolist() == [1.0] * len(catalogue)
    unknown = encoder.coverage(["\U0001f3b5\U0001f3b6", "zzzqqq", "静かなピアノ", "موسيقى هادئة"])
    assert (unknown < 0.5).all(), unknown
    assert unknown[[0, 2, 3]].tolist() == [0, 0, 0]
    assert 0 < encoder.coverage(["calm \U0001f3b5\U0001f3b6"])[0] < 1
