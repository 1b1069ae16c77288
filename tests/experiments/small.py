"""Models and samples for the protocol's tests: random weights, a tokenizer built here, rows made up here."""

import torch

from experiments.tasks import TASKS

TEXTS = ["Does this mean that it is true? Yes or No?\nYes", "It was great", "It was terrible", "the answer\n", "Maybe"]

ROWS = {
    "SST-2": [
        {"sentence": "a film of rare warmth ", "label": 1},
        {"sentence": "dull", "label": 0},
        {"sentence": "it drags , then drags on , and ends where it began ", "label": 0},
    ],
    "CB": [
        {"premise": "I doubt that it rains.", "hypothesis": "it rains", "label": 2},
        {"premise": "She knows.", "hypothesis": "she knows what it was", "label": 0},
        {"premise": "No one said it was late.", "hypothesis": "it was late", "label": 1},
    ],
    "COPA": [
        {"premise": "It broke.", "choice1": "I fell.", "choice2": "It was old.", "question": "cause", "label": 1},
        {
            "premise": "He ran.",
            "choice1": "He was tired after all.",
            "choice2": "Yes",
            "question": "effect",
            "label": 0,
        },
    ],
    "ReCoRD": [
        {
            "passage": "Ada met Bob.\n@highlight\nAda is great",
            "query": "It was @placeholder who flew",
            "entities": ["Ada", "Bob"],
            "answers": ["Ada"],
        },
        {
            "passage": "In Rome it rains.",
            "query": "@placeholder is wet",
            "entities": ["Rome", "the answer", "Maybe not"],
            "answers": ["Rome", "the answer"],
        },
        {"passage": "So it was.", "query": "Is @placeholder?", "entities": ["one"], "answers": ["one"]},
    ],
    "SQuAD": [
        {"title": "Tin", "context": "Tin melts.", "question": "What melts?", "answers": {"text": ["Tin", "tin"]}},
        {"title": "Rome", "context": "It is old and wet.", "question": "How?", "answers": {"text": ["old and wet"]}},
        {"title": "A", "context": "B.", "question": "C?", "answers": {"text": ["the answer"]}},
    ],
}
"""A few rows of tasks of every kind; ReCoRD's differ in their number of candidates."""


def samples(name):
    """The samples of `ROWS[name]`."""
    return [TASKS[name].sample(row) for row in ROWS[name]]


def tokenizer(opening=True):
    """Byte-level pairs with OPT's special tokens, as a fast tokenizer whose texts open with `</s>` as OPT's do."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(TEXTS * 10, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=pairs._tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    if opening:
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="</s>:0 $A:0", special_tokens=[("</s>", fast.convert_tokens_to_ids("</s>"))]
        )
    return fast


def model(kind, dtype=torch.float64, seed=0, positions=256):
    """A random "opt" or "llama" over the tokens of `tokenizer`, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.3},
        "llama": {"intermediate_size": 48, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": None},
    }[kind]
    config = AutoConfig.for_model(
        kind,
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()
