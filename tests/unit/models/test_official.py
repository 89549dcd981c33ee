"""Files of the authors: names, shapes, numbers, and errors for other files."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertTokenizerFast

from htcl_ray import cli
from htcl_ray.errors import ConfigError, HtclError, InputError, MismatchError
from htcl_ray.models import HTCL
from htcl_ray.models.official import PUBLISHED, ROWS, _size, read_official, sizes_of
from htcl_ray.models.record import InputRecipe
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.storage import Workspace
from tests.worlds.official_model import FRAMES, MELS, AudioModel, Wrapper, batch_of

pytestmark = pytest.mark.unit

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "calm", "piano", "techno", "fast", "##s"]
TEXTS = ["calm piano", "fast technos calm fast", "unheard"]
LENGTHS = [1, 16, 17, 400, FRAMES - 1, FRAMES, FRAMES + 40]
BERT = BertConfig(
    vocab_size=10,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=96,
    max_position_embeddings=16,
)


def randomised(module: Wrapper) -> Wrapper:
    """No parameter keeps a value (0 of a bias, 1 of a norm) that would hide a wrong name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator) * (0.5 if name.startswith("tau") else 0.05)
            )
    return module.eval()


def wrapper(stage: int, bert: BertConfig) -> Wrapper:
    torch.manual_seed(stage)
    return randomised(
        Wrapper(
            stage,
            AudioModel(channels=24, width=128, layers=2, feed_forward=80, kernel=7),
            bert,
            hidden=(40, 30),
            dim=20,
        )
    )


@functools.cache
def official_model(stage: int) -> Wrapper:
    return wrapper(stage, BERT)


def save(state: object, folder: Path) -> Path:
    torch.save(state, folder / "model-20.pth")
    return folder / "model-20.pth"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def clips() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(-40 - 5 * i, 12, (frames, MELS)).astype(np.float32) for i, frames in enumerate(LENGTHS)]


def batch() -> tuple[Tensor, Tensor]:
    """The clips in one tensor; what lies behind a clip is rubbish."""
    mel = torch.full((len(LENGTHS), max(LENGTHS), MELS), torch.nan)
    for row, clip in zip(mel, clips(), strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return mel, torch.tensor(LENGTHS)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def assert_close(actual: Tensor | np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_table_covers_the_full_model_of_the_authors(stage: str):
    """Every name and shape of their modules at full size, and the paper's number of parameters."""
    with torch.device("meta"):
        module = Wrapper(int(stage), AudioModel(), BertConfig(vocab_size=105879))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sizes = {**PUBLISHED, "M": 128, "G": 48}
    listed = {
        row.named(number)[0]: tuple(_size(dimension, sizes) for dimension in row.shape)
        for row in ROWS
        if stage in row.stages
        for number in range(sizes[row.counter] if row.counter else 1)
    }
    assert listed == expected
    assert sum(math.prod(shape) for name, shape in listed.items() if name.startswith("audio_model.")) == 88_500_511


@pytest.mark.parametrize("stage", [1, 2])
def test_imported_model_computes_the_numbers_of_the_authors(stage: int, tokenizer_folder: Path, tmp_path: Path):
    """Imported, saved and loaded, and through the encoder of batch embedding and serving; alone and in a batch with clips of
    other lengths."""
    official = official_model(stage)
    with torch.no_grad():
        audio = official.audio(clips())
        words = official.text(
            **BertTokenizerFast.from_pretrained(tokenizer_folder)(TEXTS, padding=True, return_tensors="pt")
        )
    model = HTCL.from_official(save(official.state_dict(), tmp_path), stage, tokenizer=str(tokenizer_folder))
    assert (model.stage, model.dim, model.training) == (stage, 20, False)
    assert model.record.input is InputRecipe.OFFICIAL
    assert model.recipe.max_frames == FRAMES
    assert_close(model.embed_text(TEXTS), unit(words))
    model.save_pretrained(tmp_path / "model")
    mel, valid = batch()
    for each in (model, HTCL.from_pretrained(tmp_path / "model")):
        assert_close(each.embed_mel(mel, valid), unit(audio))
        assert_close(each.embed_mel(torch.from_numpy(clips()[3])[None]), unit(audio[3:4]))
    encoder = SongEncoder.load(tmp_path / "model")
    assert_close(encoder.encode_features(mel.numpy(), valid.numpy()).semantic, unit(audio))
    assert_close(encoder.encode_songs(clips()[:4]).semantic, unit(audio[:4]))
    assert_close(encoder.encode_texts(TEXTS).semantic, unit(words))
    if stage == 1:
        assert model.temperatures() == pytest.approx({"text": math.exp(-official.tau.item())})
        return
    taus = {"text": official.tau_1, "preference": official.tau_2, "fusion": official.tau_3}
    assert len({tau.item() for tau in taus.values()}) == 3
    assert model.temperatures() == pytest.approx({term: math.exp(-tau.item()) for term, tau in taus.items()})
    with torch.no_grad():
        assert_close(model.fuse(audio[:3], words), official.fusion_mlp(torch.cat([audio[:3], words], dim=1)))


def test_text_config_states_what_weights_do_not_tell(tokenizer_folder: Path, tmp_path: Path):
    config = BertConfig(**{**BERT.to_dict(), "num_attention_heads": 4, "hidden_act": "relu"})
    official = wrapper(1, config)
    file = save(official.state_dict(), tmp_path)
    with torch.no_grad():
        expected = unit(
            official.text(
                **BertTokenizerFast.from_pretrained(tokenizer_folder)(TEXTS, padding=True, return_tensors="pt")
            )
        )
    for given in (config, config.to_dict()):
        model = HTCL.from_official(file, 1, text_config=given, tokenizer=str(tokenizer_folder))
        assert_close(model.embed_text(TEXTS), expected)
    model.save_pretrained(tmp_path / "model")
    assert_close(HTCL.from_pretrained(tmp_path / "model").embed_text(TEXTS), expected)
    assert (
        HTCL.from_official(file, 1, tokenizer=str(tokenizer_folder)).embed_text(TEXTS) - expected
    ).abs().max() > 1e-3
    with pytest.raises(MismatchError, match=r"encoder.layer.1.output.dense.weight absent \(expected \[64, 96\]\)"):
        HTCL.from_official(file, 1, text_config={**BERT.to_dict(), "num_hidden_layers": 2})
    with pytest.raises(ConfigError, match="not that of a BERT"):
        HTCL.from_official(file, 1, text_config={"model_type": "gpt2"})


def test_tokenizer_is_loaded_only_for_words(tokenizer_folder: Path, tmp_path: Path):
    """Audio is embedded without the hub, also from a folder that was saved before any word was embedded."""
    file = save(official_model(1).state_dict(), tmp_path)
    absent = str(tmp_path / "absent")
    HTCL.from_official(file, 1, tokenizer=absent).save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    model = HTCL.from_pretrained(tmp_path / "model")
    assert model.embed_mel(torch.zeros(1, 20, MELS)).shape == (1, 20)
    with pytest.raises(ConfigError, match=f"tokenizer '{absent}' cannot be loaded"):
        model.embed_text(TEXTS)
    narrow = {**official_model(1).state_dict(), "text_model.embeddings.word_embeddings.weight": torch.ones(7, 64)}
    with pytest.raises(MismatchError, match="has 10 tokens, but the text tower knows 7"):
        HTCL.from_official(save(narrow, tmp_path), 1, tokenizer=str(tokenizer_folder)).embed_text(TEXTS)


def test_audio_encoder_alone(tmp_path: Path):
    """No head, no words: the vectors are the mean over the encoder's tokens."""
    official = official_model(1).audio_model
    file = save(official.state_dict(), tmp_path)
    with torch.no_grad():
        expected = unit(official(batch_of(clips())))
    mel, valid = batch()
    for stage in (1, 2):
        model = HTCL.from_official(file, stage)
        model.save_pretrained(tmp_path / f"model-{stage}")
        for each in (model, HTCL.from_pretrained(tmp_path / f"model-{stage}")):
            assert (each.stage, each.dim, each.record.text, each.temperatures()) == (stage, 128, None, {})
            assert_close(each.embed_mel(mel, valid), expected)
            assert sum(p.numel() for p in each.parameters()) == sum(p.numel() for p in official.parameters())
    assert "embeds audio only" in (tmp_path / "model-1" / "README.md").read_text()
    with pytest.raises(InputError, match="no text tower"):
        model.embed_text(TEXTS)
    with pytest.raises(InputError, match="an audio encoder alone"):
        model.to_stage_2(0.1, seed=0)


def test_names_of_older_libraries_and_of_distributed_training(tmp_path: Path):
    state = official_model(1).state_dict()
    expected = read_official(save(state, tmp_path), 1).weights
    old = {
        name.replace("conv.parametrizations.weight.original0", "conv.weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    assert "audio_model.pos_conv_embed.conv.weight_v" in old
    for variant in (old, {f"module.{name}": tensor for name, tensor in old.items()}):
        weights = read_official(save(variant, tmp_path), 1).weights
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_every_fault_of_the_names_is_listed_with_both_shapes(tmp_path: Path):
    state = official_model(2).state_dict()
    del state["tau_2"], state["audio_model.transformer_encoder.layers.0.norm1.bias"], state["fusion_mlp.3.weight"]
    state["audio_model.cls_token"] = torch.zeros(1, 1, 64)
    state["text_model.embeddings.LayerNorm.weight"] = torch.zeros(65)
    state["audio_mlp.6.weight"] = state["audio_mlp.6.weight"].T
    state["surplus"] = torch.zeros(3, 4)
    state["audio_model.transformer_encoder.layers.2.norm1.bias"] = torch.zeros(128)
    with pytest.raises(MismatchError) as caught:
        HTCL.from_official(save(state, tmp_path), 2)
    message = str(caught.value)
    for fault in (
        "tau_2 absent (expected [])",
        "audio_model.transformer_encoder.layers.0.norm1.bias absent (expected [128])",
        "fusion_mlp.3.weight absent (expected [20, 40])",
        "audio_model.cls_token [1, 1, 64] (expected [1, 1, 128])",
        "text_model.embeddings.LayerNorm.weight [65] (expected [64])",
        "audio_mlp.6.weight [30, 20] (expected [20, 30])",
        "surplus [3, 4] (expected none)",
        "audio_model.transformer_encoder.layers.2.norm1.bias [128] (expected none)",
        "in 8 weight(s)",
    ):
        assert fault in message
    assert "\n" not in message


def test_one_wrong_tensor_does_not_change_what_is_expected_of_the_others():
    """Whichever it is; but for sizes that only one or two tensors have."""
    state = {name: tensor.to("meta") for name, tensor in official_model(2).state_dict().items()}
    rows = [row for row in ROWS if "2" in row.stages]
    right = sizes_of(state, rows)
    assert (right["D"], right["E"], right["K"], right["i"], right["n"], right["O"]) == (128, 64, 7, 2, 1, 20)
    for name, tensor in list(state.items())[::2]:
        if not name.endswith(
            ("word_embeddings.weight", "position_embeddings.weight", "type_embeddings.weight", "original0", "original1")
        ):
            wrong = torch.empty([size + 1 for size in tensor.shape], device="meta")
            assert sizes_of({**state, name: wrong}, rows) == right, name


def test_an_audio_encoder_with_faults_is_named_as_its_file_does(tmp_path: Path):
    state = official_model(1).audio_model.state_dict()
    state["layer_norm.weight"] = torch.zeros(5)
    with pytest.raises(
        MismatchError, match=r"an audio encoder alone in 1 weight\(s\): layer_norm.weight \[5\] \(expected \[128\]\)$"
    ):
        HTCL.from_official(save(state, tmp_path), 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_other_stage_is_recognised(stage: int, tmp_path: Path):
    other = 3 - stage
    with pytest.raises(
        MismatchError,
        match=rf"does not fit their stage {other}.*tau.*; it is a file of stage {stage}, so say stage {stage}$",
    ):
        HTCL.from_official(save(official_model(stage).state_dict(), tmp_path), other)


class Trap:
    """Unpickled without care, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return io.open, (str(self.mark), "w")


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {"model": state}, "'model' is a OrderedDict, not a tensor"),
        (lambda state: {**state, "epoch": 20}, "'epoch' is a int, not a tensor"),
        (lambda state: list(state.values()), "holds a list, not a state dict"),
        (lambda state: {}, "holds nothing"),
        (lambda state: torch.nn.Linear(2, 2), "not a plain state dict of torch"),
        (lambda state: {**state, "tau": torch.tensor(3)}, "no dense floating-point numbers under tau"),
        (lambda state: {**state, "tau": torch.tensor(math.nan)}, "holds NaN or infinity under tau"),
        (
            lambda state: {**state, "audio_mlp.3.weight": torch.zeros_like(state["audio_mlp.3.weight"])},
            r"holds nothing but zeros under audio_head\.2\.weight",
        ),
        (
            lambda state: {"conv1.weight": torch.zeros(1)},
            "no weights of the authors' audio encoder .the first of its 1 names is 'conv1.weight'",
        ),
        (lambda state: official_model(1).text_model.state_dict(), "only those of a text model"),
        (lambda state: _without(state, "audio_model."), "no weights of the authors' audio encoder"),
    ],
)
def test_other_state_dicts_are_refused(content, message: str, tmp_path: Path):
    with pytest.raises(HtclError, match=message) as caught:
        HTCL.from_official(save(content(official_model(1).state_dict()), tmp_path), 1)
    assert isinstance(caught.value, InputError)
    assert str(caught.value).count("\n") == 0
    assert str(tmp_path / "model-20.pth") in str(caught.value)


def test_nothing_in_a_file_is_executed(tmp_path: Path):
    with pytest.raises(InputError, match="not a plain state dict of torch"):
        HTCL.from_official(save({"tau": Trap(tmp_path / "mark")}, tmp_path), 1)
    assert not (tmp_path / "mark").exists()


def test_files_and_stages_that_cannot_be(tmp_path: Path):
    with pytest.raises(InputError, match=r"the file .* does not exist"):
        HTCL.from_official(tmp_path / "absent.pth", 1)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a plain state dict of torch"):
        HTCL.from_official(tmp_path / "text.pth", 1)
    with pytest.raises(ConfigError, match="stage is 3; expected 1"):
        HTCL.from_official(save(official_model(1).state_dict(), tmp_path), 3)
    odd = AudioModel(channels=8, width=80, layers=1, feed_forward=8, kernel=3)
    with pytest.raises(MismatchError, match="80 wide; expected a multiple of 64"):
        HTCL.from_official(save(odd.state_dict(), tmp_path), 1)
    even = AudioModel(channels=8, width=64, layers=1, feed_forward=8, kernel=4)
    with pytest.raises(MismatchError, match="not supported: position_kernel is 4; expected an odd number"):
        HTCL.from_official(save(even.state_dict(), tmp_path), 1)


def imported(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main(["import-official", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out if code == 0 else shown.err


def test_command_makes_a_model_folder(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]):
    file = save(official_model(1).state_dict(), tmp_path)
    code, shown = imported(
        capsys, file, tmp_path / "a" / "model", "--stage", 1, "--set", f"text.name_or_path={tokenizer_folder}"
    )
    assert code == 0
    assert f"→ {tmp_path}/a/model" in shown
    assert "next: " in shown
    model = HTCL.from_pretrained(tmp_path / "a" / "model")
    mel, valid = batch()
    assert torch.equal(model.embed_mel(mel, valid), HTCL.from_official(file, 1).embed_mel(mel, valid))
    assert model.embed_text(TEXTS).shape == (3, 20)
    assert (tmp_path / "a" / "model" / "tokenizer").is_dir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_command_refuses_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = save(official_model(1).state_dict(), tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    for arguments, message in (
        ((file, tmp_path / "out", "--stage", 2), "say stage 1"),
        ((file, tmp_path / "out"), "the following arguments are required: --stage"),
        ((file, tmp_path / "out", "--stage", 3), "invalid choice: 3"),
        ((tmp_path / "absent", tmp_path / "out", "--stage", 1), "does not exist; expected model-N.pth"),
        ((file, tmp_path / "full", "--stage", 1), "exists already"),
        ((file, "s3://bucket/model", "--stage", 1), "expected a local folder"),
        ((file, "/proc/nowhere/model", "--stage", 1), "cannot be written"),
        ((file, tmp_path / "out", "--stage", 2, "--parent", "x"), "--parent is for a stage-2 model in a workspace"),
    ):
        code, shown = imported(capsys, *arguments)
        assert (code, shown.count("\n")) == (2, 1), shown
        assert message in shown
    monkeypatch.setattr("htcl_ray.commands.import_official.build_manifest", lambda *_, **__: 1 / 0)
    assert imported(capsys, file, tmp_path / "out", "--stage", 1)[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model-20.pth"]
    assert (tmp_path / "full" / "diary.txt").read_text() == "mine"


def test_command_puts_both_stages_where_the_steps_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workspace = tmp_path / "workspace"
    (tmp_path / "2").mkdir()
    files = {1: save(official_model(1).state_dict(), tmp_path), 2: save(official_model(2).state_dict(), tmp_path / "2")}
    semantic, preference = (workspace / "models" / space / "official_model" for space in ("semantic", "preference"))
    common = ("--workspace", workspace)
    assert "is for the other stage" in imported(capsys, files[1], preference, "--stage", 1, *common)[1]
    assert (
        "needs --parent; its stage-1 models: none yet"
        in imported(capsys, files[2], preference, "--stage", 2, *common)[1]
    )
    code, shown = imported(capsys, files[1], semantic, "--stage", 1, *common)
    assert code == 0
    assert "next: htcl embed --workspace" in shown
    assert (
        "no stage-1 model 'other' as --parent"
        in imported(capsys, files[2], preference, "--stage", 2, "--parent", "other", *common)[1]
    )
    assert imported(capsys, files[2], preference, "--stage", 2, "--parent", "official_model", *common)[0] == 0
    semantic_model = artifacts.newest_semantic(Workspace(str(workspace)), "failed")
    grown = artifacts.newest_preference(Workspace(str(workspace)), semantic_model, "failed")
    assert (semantic_model.version, grown and grown.version) == ("official_model", "official_model")
    assert semantic_model.manifest["config"]["model"]["dim"] == 20
    vectors = SongEncoder.load(semantic, preference).encode_songs(clips()[:2])
    with torch.no_grad():
        for stage, half in ((1, vectors.semantic), (2, vectors.preference)):
            assert_close(half, unit(official_model(stage).audio(clips()[:2])))
