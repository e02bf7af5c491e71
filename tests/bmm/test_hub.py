from __future__ import annotations

import pytest

from bmm.hub import HubId, hub_id


@pytest.mark.parametrize(
    ("source", "repository", "revision"),
    [
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32", None),
        ("a/b@main", "a/b", "main"),
        ("a/b@refs/pr/12", "a/b", "refs/pr/12"),
        ("1aurent/Patch_Camelyon.v2@3f9", "1aurent/Patch_Camelyon.v2", "3f9"),
    ],
)
def test_a_hub_id_has_an_owner_a_name_and_perhaps_a_revision(
    source: str, repository: str, revision: str | None
) -> None:
    found = hub_id(source)
    assert found == HubId(repository, revision)
    assert found.mistake is None


@pytest.mark.parametrize("source", ["json", "./base", "a/b/c", "models:/a@b", "/a/b", "a/b@", "ä/b", "a b/c", ""])
def test_other_sources_are_none(source: str) -> None:
    assert hub_id(source) is None


@pytest.mark.parametrize(
    ("source", "said"), [("a/b--c", "'--'"), ("a/b..c", "'..'"), ("a/b.git", "ends"), ("a/" + "b" * 99, "96")]
)
def test_what_the_hub_would_refuse_is_named(source: str, said: str) -> None:
    found = hub_id(source)
    assert found is not None
    assert said in str(found.mistake)
