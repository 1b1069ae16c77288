"""The texts: splits share nothing, every byte is predicted once, the same machine always gives the same."""

import pytest
import torch

from experiments.tiny import corpus


@pytest.fixture(scope="module")
def prose():
    return corpus.prose()


def keys(text):
    return {" ".join(paragraph.split()) for paragraph in corpus.paragraphs(text.decode())} - {""}


def test_no_topic_and_no_paragraph_is_in_two_splits(prose):
    splits = list(corpus.SHARES)
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            assert not set(prose.topics[a]) & set(prose.topics[b])
            assert not keys(prose.text[a]) & keys(prose.text[b])


def test_the_splits_have_their_shares(prose):
    total = sum(map(len, prose.text.values()))
    assert total > 250_000
    for split, share in corpus.SHARES.items():
        assert len(prose.text[split]) / total == pytest.approx(share, abs=0.02)


def test_a_repeated_paragraph_stays_in_the_longest_topic_only():
    long, short = "one, " * 60, "two, " * 50
    topics = {"a": short, "quoting": f"{long}\n\n{short}", "b": "three, " * 40}
    unique = corpus.without_repeats(topics)
    assert list(unique) == ["quoting", "b"]
    assert unique["quoting"] == f"{long}\n\n{short}\n"


def test_topics_are_dealt_out_whatever_they_are_called():
    topics = {f"t{i}": f"topic {i} " * (30 + i) for i in range(40)}
    prose = corpus.prose(topics)
    assert sorted(name for names in prose.topics.values() for name in names) == sorted(topics)
    assert prose == corpus.prose(dict(reversed(topics.items())))
    with pytest.raises(ValueError, match="a split needs 3"):
        corpus.prose({"only": "text " * 100})


def test_code_leaves_out_tests_installed_packages_and_the_prose(tmp_path):
    for name in (
        "a.py",
        "b/c.py",
        "test/t.py",
        "site-packages/x.py",
        "pydoc_data/topics.py",
        "pdb.py",
        "z.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    train, held_out = corpus.code(held_out_every=3, root=tmp_path)
    assert train == b"a.py\nb/c.py"
    assert held_out == b"z.py"
    with pytest.raises(FileNotFoundError, match="no Python source"):
        corpus.code(root=tmp_path / "nowhere")


def test_blocks_hold_every_byte_once_behind_bos():
    text = bytes(range(50))
    ids = corpus.blocks(text, 8, offset=1)
    assert ids.shape == (6, 9)
    assert (ids[:, 0] == corpus.BOS).all()
    assert bytes(ids[:, 1:].flatten().tolist()) == text[1:49]
    with pytest.raises(ValueError, match="do not fill one block of 64"):
        corpus.blocks(text, 64)


def test_an_epoch_is_a_shuffle_that_its_generator_decides():
    text = bytes(i % 251 for i in range(1000))

    def passed(seed):
        return torch.cat(list(corpus.epoch(text, 10, 4, torch.Generator().manual_seed(seed))))

    first = passed(0)
    assert len(list(corpus.epoch(text, 10, 4, torch.Generator()))) == corpus.batches_per_epoch(text, 10, 4) == 25
    assert torch.equal(first, passed(0))
    assert not torch.equal(first, passed(1))
    starts = sorted(first[:, 1].tolist())
    assert len(first) == 99
    assert starts != first[:, 1].tolist()


def test_thinning_spreads_over_the_text():
    text = bytes(range(256)) * 64
    thinned = corpus.thin(text, 4096, piece=1024)
    assert len(thinned) == 4096
    assert thinned.startswith(text[:1024])
    assert thinned.endswith(text[-1024:])
    assert corpus.thin(text, len(text) + 1) is text
