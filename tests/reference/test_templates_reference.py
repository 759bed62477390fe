"""Rendered conversations and assistant masks, token for token those of transformers."""

import datetime
import json
import types

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import text
from text import store

# Templates in the styles of well-known families; <G> and </G> stand where some of them have marks.
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}<G>{{ message['content'] + '<|im_end|>' }}</G>
{%- else %}{{ message['content'] + '<|im_end|>' }}
{%- endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and not message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}<G>{{- message.content + '<|im_end|>' }}</G>{{- '\\n' }}
    {%- elif message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now("%d %b %Y") %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date + "\\n\\n" }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' -%}
        <G>{{- message['content'] | trim + '<|eot_id|>' }}</G>
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
STYLES = {"chatml": CHATML, "qwen": QWEN, "llama3": LLAMA3}
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

contents = st.text(st.sampled_from("ab e\n\tü二🙂.<"), max_size=20)
turns = st.tuples(contents, contents)
talks = st.tuples(st.none() | contents, st.lists(turns, min_size=1, max_size=4), st.booleans())
# A busy machine is slow, which says nothing of the code.
unhurried = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def conversation(talk) -> list[dict[str, str]]:
    system, turns, answered = talk
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answer in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return messages if answered else messages[:-1]


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    """Ours without marks in its template, ours and theirs with them."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    lines = ["system\n\n user\n assistant\n\n be ab ab eb\n\n"] * 9
    encoder.train_from_iterator(lines, trainer)
    template = STYLES[request.param]
    marked = template.replace("<G>", "{% generation %}").replace("</G>", "{% endgeneration %}")
    bare = template.replace("<G>", "").replace("</G>", "")
    ours = []
    for name, source in (("bare", bare), ("marked", marked)):
        folder = tmp_path_factory.mktemp(name)
        encoder.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "chat_template": source}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        ours.append(text.load_tokenizer(folder))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=encoder,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        chat_template=marked,
    )
    today = types.SimpleNamespace(now=lambda: datetime.datetime(2024, 7, 26))  # as ours
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.utils.chat_template_utils, "datetime", today)
        yield *ours, theirs


def tokens_and_mask(tokenizer: text.Tokenizer, messages) -> tuple[list[int], list[int]]:
    piece = tokenizer.render_chat(messages, "assistant", "here")
    (encoding,) = tokenizer.encode([piece])
    mask = [0] * len(encoding.ids)
    runs = store._runs(encoding.offsets, piece.spans)
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        mask[start:stop] = [1] * (stop - start)
    return encoding.ids, mask


@unhurried
@given(talks)
def test_marked_templates_give_the_masks_of_transformers(pair, talk):
    _, marked, theirs = pair
    messages = conversation(talk)
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = tokens_and_mask(marked, messages)
    assert ids == expected["input_ids"] and mask == expected["assistant_masks"]


@unhurried
@given(talks)
def test_unmarked_templates_give_the_same(pair, talk):
    bare, marked, _ = pair
    messages = conversation(talk)
    assert tokens_and_mask(bare, messages) == tokens_and_mask(marked, messages)


def test_a_mask_made_by_hand(pair):
    bare, _, _ = pair
    messages = conversation(("be", [("a", "first"), ("b", "second")], True))
    ids, mask = tokens_and_mask(bare, messages)
    kept = [token for token, learned in zip(ids, mask, strict=True) if learned]
    end = (
        "<|eot_id|>" if "<|eot_id|>" in bare.render_prompt(messages, "here").text else "<|im_end|>"
    )
    decoded = bare.encoder.decode(kept, skip_special_tokens=False)
    assert decoded == f"first{end}second{end}"
