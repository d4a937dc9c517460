"""Words for semantic triggers: the stand-in against plain counting, BERT against transformers, tokens, bad input."""
import configparser, importlib.util, itertools, pickle, re, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mcl_repro.attacks import semantic as T
from mcl_repro.model.clip import _byte_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.attacks.semantic import (
    BertModel, MASKED, natural_triggers, NgramModel, semantic_candidates, split_words, word_model, WordModel,
)
from mcl_repro.core.libraries import import_torchvision

ROOT = Path(__file__).resolve().parents[2]
TOY = ["a photo of a dog", "a photo of the sun", "two dogs run", "a view of a dog , a cat", "the cat and the dog"]


@pytest.fixture(scope="module")
def captions():
    return open_data("world:retrieval_flickr8k_train:400").captions


@pytest.fixture(scope="module")
def tokenizer():
    return _byte_pairs(32)


# ---- the stand-in

def smoothed(texts, vocabulary, word, *history):
    "Witten and Bell's probability, written down as the formula is, by counting in lists."
    if history == ("uniform",):
        return 1/(len(vocabulary) + 2)               # all words, the end, the unknown word
    lower = history[1:] if history else ("uniform",)
    followers = [t[i] for t in texts for i in range(2, len(t)) if tuple(t[i - len(history):i]) == history]
    if not followers:
        return smoothed(texts, vocabulary, word, *lower)
    different = len(set(followers))
    return (followers.count(word) + different*smoothed(texts, vocabulary, word, *lower))/(len(followers) + different)


def test_probabilities_are_witten_and_bells():
    model, texts = NgramModel(TOY), [["<s>", "<s>", *split_words(c), "</s>"] for c in TOY]
    vocabulary = {w for t in texts for w in t} - {"<s>", "</s>"}
    for older, last in [("<s>", "<s>"), ("<s>", "a"), ("a", "photo"), ("dog", "sun"), ("of", "a"), ("run", "run")]:
        numbers = [model.words.index(w) for w in (older, last)]
        expected = [smoothed(texts, vocabulary, w, older, last) for w in model.words[1:]]
        np.testing.assert_allclose(model._after(*numbers)[1:], expected, rtol=1e-12)
    assert model._after(*numbers)[0] == 0 and abs(model._after(None, model.words.index("dog")).sum() - 1) < 1e-12


WORDS = st.sampled_from(["", "a", "photo", "of", "dog", "sun", "zebra"])


@given(
    words=st.lists(WORDS, min_size=1, max_size=3),
    position=st.integers(0, 2),
    caption=st.sampled_from(["a dog", "the sun", "zebra", ""]),
)
@settings(max_examples=40, deadline=None)
def test_hidden_slots_are_summed_over(words, position, caption):
    position = min(position, len(words) - 1)
    model = NgramModel(TOY)
    size = len(model.words)
    pair = np.array([model._after(None, u) if u != 1 else np.zeros(size) for u in range(size)])
    text = [*words, *(split_words(caption)[:1] or ["</s>"])]
    number = lambda word: model._number.get(word, 1 if word == "</s>" else 2)
    known = [None if i == position or word == "" else number(word) for i, word in enumerate(text)]
    scores, first = np.zeros(size), known.index(None)
    end = next(i for i in range(position + 1, len(known)) if known[i] is not None)
    # the chain starts behind the nearest known word
    begin = next((i for i in range(position - 1, -1, -1) if known[i] is not None), -1) + 1
    hidden = [i for i in range(begin, end) if known[i] is None]
    for filling in itertools.product(range(size), repeat=len(hidden)):
        chain = dict(enumerate(known)) | dict(zip(hidden, filling)) | {-1: 0, -2: 0}
        p = model._after(chain[begin - 2], chain[begin - 1])[chain[begin]]
        for i in range(begin + 1, end + 1):
            p *= pair[chain[i - 1], chain[i]]
        scores[chain[position]] += p
    found = model.fill([caption], [words], position, 6)[0]
    best = sorted(range(3, size), key=lambda i: -scores[i])[:6]
    np.testing.assert_allclose([scores[model.words.index(w)] for w in found], scores[best], rtol=1e-9)
    assert first <= position and len(set(found)) == 6


def test_the_same_captions_give_the_same_proposals_in_any_order_and_company(captions):
    one, other = NgramModel(captions), NgramModel(captions[::-1])
    assert one.words == other.words
    asked = captions[:60]
    together = natural_triggers(one, asked, 3)
    assert together == natural_triggers(other, asked, 3) == [natural_triggers(one, [c], 3)[0] for c in asked]
    ties = NgramModel(["x b", "x a", "x c"])
    assert ties.fill(["zz"], [["x", ""]], 1, 3) == [["a", "b", "c"]]           # equally likely: by the alphabet


def test_the_proposals_lead_over_to_the_caption(captions):
    model = NgramModel(captions)
    assert natural_triggers(model, ["a banana"], 3) == [["a", "photo", "of"]]
    left = [model.fill(["a banana"], [[w, ""]], 1, 3)[0] for w in ("an", "a")]
    assert left[0] != left[1]                                                   # the left neighbour counts
    right = [model.fill(["a banana"], [["", w]], 0, 3)[0] for w in ("photo", "image")]
    assert right[0][0] == "a" and right[1][0] == "an"                           # and the right one
    for several, one in (("of an", "an"), ("view of a", "a")):
        assert model.fill(["a banana"], [[several, ""]], 1, 5) == model.fill(["a banana"], [[one, ""]], 1, 5)
    assert model.fill(["a banana"], [["", "image of a"]], 0, 5) == model.fill(["a banana"], [["", "image"]], 0, 5)
    unknown = [model.fill(["a banana"], [words], 0, 3) for words in (["a", "word never seen"], ["any", "other word"])]
    assert unknown[0] == unknown[1]


def test_what_it_writes_is_natural_to_a_model_that_had_no_part_in_it(captions):
    learned = captions[:1200]
    asked = captions[1200:1600]
    judge = NgramModel(open_data("world:retrieval_flickr8k:300").captions)
    model = NgramModel(learned)
    random_words = np.random.default_rng(0).choice(model.words[3:], (len(asked), 3))
    judged = lambda triggers: judge.log_probability([" ".join([*t, c]) for t, c in zip(triggers, asked)], 4)
    natural, drawn = judged(natural_triggers(model, asked, 3)), judged(random_words)
    assert natural.mean() > drawn.mean() + 3 and (natural > drawn).mean() > .95


def test_captions_of_any_kind():
    model = NgramModel(["Ein Mädchen läuft!", "عربي نص", "2 dogs, 14 cats...", "", "don't"])
    assert {"mädchen", "1", "4", "...", "'t", "نص"} <= set(model.words)
    found = model.fill(["", "!!", "never seen", "EIN"], [["", ""]]*4, 0, 3)
    assert [len(set(f)) for f in found] == [3]*4 and not {"<s>", "</s>", "<unk>"} & set(sum(found, []))


# ---- candidates as CLIP's tokens

class Fixed:
    name = "fixed"
    def __init__(self, words):
        self.words, self.asked = words, []
    def fill(self, captions, trigger, position, count):
        self.asked.append((trigger, position))
        return [self.words[:count] for _ in captions]


def test_words_that_are_no_single_token_become_the(tokenizer):
    model = Fixed(["next", ",", "itap", "##ing", "suddenly", "[UNK]"])
    [the], [dog] = tokenizer.encode("the"), tokenizer.encode("dog")
    triggers = np.array([[dog, MASKED, -7], [MASKED, MASKED, dog]], np.int32)
    found = semantic_candidates(model, tokenizer, ["a", "b"], triggers, 1, 6)
    [following], [comma], [suddenly] = (tokenizer.encode(word) for word in ("next", ",", "suddenly"))
    assert found.dtype == np.int64
    assert found.tolist() == [[following, comma, the, the, suddenly, the]]*2
    assert model.asked == [([["dog", "", ""], ["", "", "dog"]], 1)]
    assert semantic_candidates(NgramModel(TOY), tokenizer, [], np.zeros((0, 3), int), 0).shape == (0, 5)


def test_ids_become_words_and_words_ids(captions, tokenizer):
    model, asked = NgramModel(captions), captions[:128]
    state = np.full((128, 3), MASKED)
    for position in range(3):
        state[:, position] = semantic_candidates(model, tokenizer, asked, state, position)[:, 0]
    words = natural_triggers(model, asked, 3)
    for ids, opening, caption in zip(state.tolist(), words, asked):
        assert tokenizer.encode(" ".join([*opening, caption])) == [*ids, *tokenizer.encode(caption)]
    piece = next(i for i in range(256) if "\ufffd" in tokenizer.decode([i]))
    # half a character is an unknown word
    assert semantic_candidates(model, tokenizer, asked[:1], [[piece, MASKED, MASKED]], 1).shape == (1, 5)


def test_bad_input(captions, tokenizer):
    model, state = NgramModel(TOY), np.full((2, 3), MASKED)
    good = dict(model=model, tokenizer=tokenizer, captions=["a", "b"], triggers=state, position=0)
    for bad, message in (
        (dict(position=3), "slots 0 to 2"),
        (dict(position=-1), "slots 0 to 2"),
        (dict(count=0), "one word at least"),
        (dict(captions=["a"]), "1 captions and 2 triggers"),
        (dict(triggers=state[0]), r"shape \(3,\)"),
        (dict(tokenizer=str), "without decode"),
        (dict(tokenizer=Fixed([])), "without encode"),
    ):
        with pytest.raises(SettingsError, match=message):
            semantic_candidates(**(good | bad))
    with pytest.raises(SettingsError, match="different lengths"):
        model.fill(["a", "b"], [["", ""], [""]], 0, 1)
    with pytest.raises(DataError, match="99 words asked for, the captions of the trigram stand-in hold 13"):
        model.fill(["a"], [[""]], 0, 99)
    with pytest.raises(DataError, match="hold no words"):
        NgramModel([])
    with pytest.raises(SettingsError, match="length 0"):
        natural_triggers(model, ["a"], 0)
    with pytest.raises(SettingsError, match="unknown word model 'Bert': use ngram, the offline stand-in, or bert"):
        word_model("Bert", TOY)
    with pytest.raises(SettingsError, match="learns from captions"):
        word_model("ngram")


# ---- BERT

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="the extra bert is not installed: pip install 'mcl_repro[bert]'",
)
VOCABULARY = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a the dog ##s run ##ning photo of , ! next suddenly there he saw "
    "two girl pink shirt"
).split()


def write_bert(folder, vocabulary=VOCABULARY, head=True, **config):
    "A BERT with random weights and a small vocabulary."
    transformers = T._import_transformers()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5, **{"max_position_embeddings": 24, **config},
    )
    (transformers.BertForMaskedLM if head else transformers.BertModel)(config).save_pretrained(folder)
    if vocabulary:
        (folder/"vocab.txt").write_text("\n".join(vocabulary))
    return folder


def test_without_transformers_the_remedy_is_named(monkeypatch):
    import_torchvision()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingsError, match=r"pip install 'mcl_repro\[bert\]'"):
        word_model("bert")


@needs_transformers
def test_bert_answers_as_transformers_does(tmp_path):
    transformers, model = T._import_transformers(), BertModel(write_bert(tmp_path), batch_size=2)
    reference = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    tok = transformers.BertTokenizer.from_pretrained(tmp_path)
    captions = ["A dog running", "two dogs, there!", "the girl"]
    triggers = [["", "", ""], ["next", "", "suddenly"], ["dogs", "", ""]]
    seen = {0: ["[MASK] [MASK] [MASK]", "[MASK] [MASK] suddenly", "[MASK] [MASK] [MASK]"],
            1: ["[MASK] [MASK] [MASK]", "next [MASK] suddenly", "dog ##s [MASK] [MASK]"]}
    for position, slots in seen.items():
        found = model.fill(captions, triggers, position, 4)
        for i, (slot, caption) in enumerate(zip(slots, captions)):
            ids = tok.convert_tokens_to_ids(["[CLS]", *slot.split(), *tok.tokenize(caption), "[SEP]"])
            place = 1 + position + (i == 2 and position == 1)                    # `dogs` is two pieces
            with torch.no_grad():
                logits = reference(torch.tensor([ids])).logits[0, place]
            order = [VOCABULARY[j] for j in logits.argsort(descending=True)]
            assert found[i] == [word for word in order if not re.match(r"##|\[", word)][:4]
    assert isinstance(model, WordModel) and not model.model.training


@needs_transformers
def test_bert_does_not_see_the_batch_and_cuts_only_its_own_view(tmp_path, tokenizer):
    model = word_model("bert", name=write_bert(tmp_path), batch_size=3)
    captions = ["a dog", "the girl saw a pink shirt " * 9, "two", "", "dog ! " * 3]
    together = natural_triggers(model, captions, 3)
    assert together == [natural_triggers(model, [c], 3)[0] for c in captions] and len({tuple(t) for t in together}) > 1
    ids, seen, _ = model._inputs(captions, [[""]*3]*5, 0)
    assert ids.shape == (5, 24) and ids[1, -1] == 4 and seen.sum(1).tolist() == [7, 24, 6, 5, 11]
    state = np.full((5, 3), MASKED)
    for position in range(3):
        state[:, position] = semantic_candidates(model, tokenizer, captions, state, position)[:, 0]
    assert [tokenizer.decode(t).split() for t in state] == together
    assert model.fill([], [], 0, 5) == []


@needs_transformers
def test_pieces_are_proposed_only_when_asked_for(tmp_path):
    write_bert(tmp_path)
    words, all_of_it = BertModel(tmp_path), BertModel(tmp_path, pieces=True)
    most = len([w for w in VOCABULARY if not re.match(r"##|\[", w)])
    assert not [w for w in words.fill(["a dog"], [[""]], 0, most)[0] if re.match(r"##|\[", w)]
    assert set(all_of_it.fill(["a dog"], [[""]], 0, len(VOCABULARY))[0]) == set(VOCABULARY)
    with pytest.raises(DataError, match=f"{most + 1} words asked for"):
        words.fill(["a dog"], [[""]], 0, most + 1)


class Danger:
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return Path.touch, (self.path,)


@needs_transformers
def test_weights_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path/"cache"))
    with pytest.raises(DataError, match=r"no BERT at '.*nothing'.*give a folder"):
        BertModel(tmp_path/"nothing")
    for name, weights, message in (
        ("headless", dict(head=False), "no masked language model"),
        ("wordless", dict(vocabulary=None), "vocab|no BERT"),
        ("other", dict(vocabulary=VOCABULARY + ["more"]), "belongs to another model"),
    ):
        (tmp_path/name).mkdir()
        with pytest.raises(DataError, match=message):
            BertModel(write_bert(tmp_path/name, **weights))
    (tmp_path/"short").mkdir()
    weights = write_bert(tmp_path/"short")/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="no BERT at"):
        BertModel(tmp_path/"short")
    weights.unlink()
    torch.save({"bert": Danger(tmp_path/"harm")}, tmp_path/"short/pytorch_model.bin")
    with pytest.raises(DataError, match="no BERT at"):
        BertModel(tmp_path/"short")
    assert not (tmp_path/"harm").exists()
    pickle.loads(pickle.dumps(Danger(tmp_path/"harm")))
    assert (tmp_path/"harm").exists()      # it would have done harm


# ---- packages

def test_the_extra_is_declared_and_pinned():
    from packaging.requirements import Requirement
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    [wanted] = [Requirement(r) for r in parser["DEFAULT"]["bert_requirements"].split()]
    lines = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert wanted.name == "transformers"
    assert wanted.specifier.contains(pinned["transformers"])
    assert {"tokenizers", "huggingface_hub", "safetensors"} <= set(pinned)
    assert "transformers" not in parser["DEFAULT"]["requirements"]
