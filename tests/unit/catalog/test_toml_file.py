"""
The catalogue file: what is shipped holds, what users add is merged, what is wrong is named.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import BadCatalogue
from tests.factories import make_spec
from worker.catalog.catalogue import Catalogue
from worker.catalog.hf_config import packed_as
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.toml_file import load_catalogue
from worker.memory.weigh import checkpoint_bytes

ENTRY = """
[[models]]
id = "mine"
engine = "llamacpp"
tier = 1
complexity_up_to = 0.5
max_model_len = 512
path = "mine.gguf"
"""


def user_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "models.toml"
    file.write_text(text)
    return file


def test_every_shipped_entry_can_be_estimated() -> None:
    """
    Nothing has to be downloaded to know whether a shipped model fits: all facts are there, and plausible.
    """
    catalogue = load_catalogue()

    assert len(catalogue) >= 60
    for spec in catalogue:
        assert spec.architecture is not None
        assert (spec.architecture.unknown_weights, spec.architecture.unknown_cache) == ((), ())
        assert spec.architecture.assumed == ()
        assert spec.licence
        assert spec.capabilities & {"chat", "embedding"}
        assert not spec.trust_remote_code


# Their files hold more than is loaded: the output head, a copy of the embeddings; or the layer of a draft.
STORED_MORE = {"qwen3-0.6b", "qwen3-1.7b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b"}
WEIGHED = [spec for spec in load_catalogue() if spec.weights_bytes and spec.engine is EngineKind.VLLM]


@pytest.mark.parametrize("spec", WEIGHED, ids=lambda spec: spec.id)
def test_files_and_architecture_agree(spec: ModelSpec) -> None:
    """
    The bytes of the files are those that the config's matrices add up to, within 1 %.
    """
    assert spec.architecture is not None
    assert spec.weights_bytes is not None
    share = checkpoint_bytes(packed_as(spec.architecture, spec.quantization)) / spec.weights_bytes

    assert 0.99 <= share <= 1.01 or (spec.id in STORED_MORE and 0.75 <= share < 0.99)


def test_every_tier_is_trusted_with_more_than_the_one_below() -> None:
    """
    The cascade climbs: the best of a tier takes harder jobs than the best of the tier below, up to 1.
    """
    catalogue = load_catalogue()
    tiers = sorted({spec.tier for spec in catalogue})
    best = [max(spec.complexity_up_to for spec in catalogue if spec.tier == tier) for tier in tiers]

    assert tiers == list(range(1, 7))
    assert best == sorted(set(best))
    assert best[-1] == 1.0


def test_a_users_entry_is_added(tmp_path: Path) -> None:
    """
    Beside the shipped ones, its path starting at the file's own folder.
    """
    catalogue = load_catalogue(user_file(tmp_path, ENTRY))
    mine = catalogue.find("mine")

    assert len(catalogue) == len(load_catalogue()) + 1
    assert mine is not None
    assert mine.path == tmp_path / "mine.gguf"
    assert mine.engine is EngineKind.LLAMACPP


def test_paths_start_where_the_setting_says(tmp_path: Path) -> None:
    """
    MODELS_DIR wins over the file's folder; an absolute path stays as it is.
    """
    absolute = ENTRY.replace("mine.gguf", "/srv/mine.gguf")

    (relative,) = load_catalogue(user_file(tmp_path, "replace = true\n" + ENTRY), base_dir=Path("/data")).models
    (fixed,) = load_catalogue(user_file(tmp_path, "replace = true\n" + absolute), base_dir=Path("/data")).models

    assert relative.path == Path("/data/mine.gguf")
    assert fixed.path == Path("/srv/mine.gguf")


def test_a_users_entry_takes_the_place_of_a_shipped_one(tmp_path: Path) -> None:
    """
    The same id means the same queue, so there is one of it, and it is the user's.
    """
    catalogue = load_catalogue(user_file(tmp_path, ENTRY.replace('"mine"', '"qwen3-8b"')))
    found = catalogue.find("qwen3-8b")

    assert len(catalogue) == len(load_catalogue())
    assert found is not None
    assert found.max_model_len == 512


def test_replace_drops_everything_shipped(tmp_path: Path) -> None:
    """
    Only the user's own models are left.
    """
    assert load_catalogue(user_file(tmp_path, "replace = true\n" + ENTRY)).ids == ("mine",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENTRY + 'colour = "red"', r"Model mine: unknown key colour; allowed are id, engine, tier"),
        ("size = 3", r"Top of the file: unknown key size; allowed are replace, models"),
        (ENTRY.replace("tier = 1", "tier = 0"), r"Model mine, tier: .* greater than or equal to 1"),
        (ENTRY.replace("0.5", "1.5"), r"Model mine, complexity_up_to: .* less than or equal to 1"),
        (ENTRY.replace('"llamacpp"', '"ollama"'), r"Model mine, engine: .* 'vllm', 'llamacpp' or 'stub'"),
        (ENTRY.replace('"mine"', '"my model"'), r"Model my model, id: .* pattern"),
        (ENTRY.replace('id = "mine"', ""), r"Model number 1, id: Field required"),
        (ENTRY + 'capabilities = ["fly"]', r"Model mine, capabilities\.0: Input should be 'chat'"),
        (ENTRY.replace('path = "mine.gguf"', ""), r"Model mine: exactly one of repo and path is needed"),
        (ENTRY + 'repo = "a/b"', r"Model mine: exactly one of repo and path is needed"),
        (ENTRY.replace('path = "mine.gguf"', 'repo = "a/b"'), r"Model mine: llamacpp with a repo needs file"),
        (ENTRY + ENTRY, r"two models with the id mine"),
        (ENTRY + 'aliases = ["QWEN3-8b"]', r"'qwen3-8b' names both qwen3-8b and mine"),
        ("models = 3", r"Top of the file, models"),
        ("models = [3]", r"Model number 1"),
        ("[[models", r"is no TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    """
    The message names the file, the entry, the key, and what is allowed there.
    """
    file = user_file(tmp_path, text)

    with pytest.raises(BadCatalogue, match=says) as caught:
        load_catalogue(file)
    assert str(file) in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """
    With the setting to check.
    """
    with pytest.raises(BadCatalogue, match=r"nope\.toml cannot be read: .* Check MODELS_FILE"):
        load_catalogue(tmp_path / "nope.toml")


def test_an_id_wins_over_an_alias_and_a_repository() -> None:
    """
    Letter case is forgiven; what nobody is called finds nothing.
    """
    a = make_spec("a", aliases=("small",), repo="org/a")
    b = make_spec("b", aliases=("Fast",), repo="org/b")
    catalogue = Catalogue(models=(a, b))

    assert catalogue.find("a") is a
    assert catalogue.find("FAST") is b
    assert catalogue.find("Org/B") is b
    assert catalogue.find("c") is None


@pytest.mark.parametrize("spec", [s for s in load_catalogue() if s.engine is EngineKind.VLLM], ids=lambda spec: spec.id)
def test_a_vllm_model_that_calls_tools_or_thinks_names_its_parser(spec: ModelSpec) -> None:
    """
    Without one vLLM refuses tools, and leaves the thoughts in the answer.
    """
    assert ("tools" in spec.capabilities) == (spec.tool_parser is not None)
    assert ("thinking" in spec.capabilities) == (spec.reasoning_parser is not None)
