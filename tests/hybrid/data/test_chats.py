"""Chats: what a template renders is what is trained on; or, of it, what the assistant says."""

import json
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from hybrid.data.blocks import TokenBlocks, read_rows
from hybrid.data.chats import Chat, read_template, render, render_marked
from hybrid.data.sources import Sources, unused_columns
from hybrid.data.stream import TokenStream
from tests.support.tiny_text import CHARACTERS, character_tokenizer

CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)
WITH_TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}"
    "{% if documents %}{{ documents[0].title }} {% endif %}"
    "{% if style is defined %}{{ style }} {% endif %}{% for m in messages %}{% if m.tool_calls is "
    "defined %}CALL {{ m.tool_calls[0].name }} {% else %}{{ m.content }} {% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOLS = [{"name": "weather", "parameters": {"default": None}}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_template(template):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(folder, rows, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [name]


def text_of(names, tokenizer, field="messages"):
    blocks = TokenBlocks.read(names, tokenizer, 4, field)
    return "".join(CHARACTERS[i] for k in range(len(blocks)) for i in blocks[k]["input_ids"].tolist())


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("<end>", "|"), CHATML + "<end>"])
def test_what_the_template_renders_is_what_is_trained_on(template, folder):
    """No end is put after it: not a second one, and none of ours in place of the template's."""
    tokenizer = with_template(template)
    once = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text_of(write(folder, [{"messages": CHAT}] * 4), tokenizer) == once * 4


def test_what_else_the_template_takes_is_handed_to_it(folder):
    tokenizer = with_template(WITH_TOOLS)
    given = {
        "tools": TOOLS,
        "documents": [{"title": "doc", "text": ""}],
        "chat_template_kwargs": {"style": "s"},
    }
    rows = [{"messages": CHAT, "id": 1, "tools": json.dumps(TOOLS)}, {"messages": CHAT, **given, "loss": 2}]
    wanted = [
        tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False),
        tokenizer.apply_chat_template(
            CHAT, tools=TOOLS, documents=given["documents"], style="s", tokenize=False
        ),
    ]
    names = write(folder, rows)
    assert "".join(wanted).startswith(text_of(names, tokenizer))
    assert "TOOLS" in wanted[0] and "doc s hi" in wanted[1]
    assert unused_columns(Sources(names), tokenizer) == ["id", "loss"]
    assert unused_columns(Sources(names), with_template(CHATML)) == ["documents", "id", "loss", "tools"]


def test_nulls_of_parquet_are_no_keys(folder):
    datasets = pytest.importorskip("datasets", reason="parquet needs the package datasets")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "id": None}]}
    chats = [CHAT, [CHAT[0], call]] * 4
    tools = [{"name": "weather", "strict": None}], [{"name": "b", "strict": True}]
    rows = [{"messages": chat, "tools": some} for chat, some in zip(chats, tools * 4, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    tokenizer = with_template(WITH_TOOLS)
    wanted = 'TOOLS [{"name": "weather"}] hi yes TOOLS [{"name": "b", "strict": true}] hi CALL weather '
    assert text_of(["a.parquet"], tokenizer).startswith(wanted)


def test_sharegpt(folder):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
    ]
    tokenizer = with_template(CHATML)
    names = write(folder, [{"conversations": turns, "id": 1}] * 3)
    for field in ("conversations", "text"):
        assert text_of(names, tokenizer, field).startswith(
            "[system]s<end>\n[user]hi<end>\n[assistant]yes<end>\n"
        )
    names = write(folder, [{"conversations": [{"from": "nobody", "value": "x"}]}])
    with pytest.raises(ValueError, match="line 1: expected a turn to be from system, human, .* got 'nobody'"):
        text_of(names, tokenizer, "conversations")


def test_a_chat_in_a_cell_and_a_text_that_is_null(folder):
    tokenizer = with_template(CHATML)
    turns = [{"from": "Human", "value": "hi"}, {"role": "assistant", "content": "yes"}]
    (folder / "a.csv").write_text("messages\n" + '"' + json.dumps(turns).replace('"', '""') + '"\n')
    wanted = "[user]hi<end>\n[assistant]yes<end>\n"
    assert wanted.startswith(text_of(["a.csv"], tokenizer, "text"))
    assert wanted.startswith(text_of(write(folder, [{"text": None, "messages": CHAT}]), tokenizer, "text"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"user": "x", "text": "y"}]},
            "a turn to have role, or from and value, got user, text",
        ),
        (
            {"messages": [CHAT[0], {"role": "asistant", "content": "y"}]},
            "a turn's role, got 'asistant'; did you mean 'assistant'",
        ),
        ({"messages": [{"role": "User", "content": "y"}]}, "got 'User'; did you mean 'user'"),
        ({"messages": []}, "text or a chat in the field 'messages', got \\[\\]"),
        (
            {"mesages": CHAT},
            "got mesages; did you mean 'messages'",
        ),
        ({"messages": [{"role": None, "content": "y"}]}, "a turn to have role, .*, got role, content"),
        ({"messages": [{"from": ["x"], "value": "y"}]}, r"a turn to be from system, .* got \['x'\]"),
        ({"messages": CHAT, "tools": "none"}, "expected JSON in the column 'tools', got 'none'"),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "expected variables .* got list"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "variables .* got tokenize in it"),
        ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "got chat_template in it"),
    ],
)
def test_a_chat_that_is_none(row, message, folder):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        text_of(write(folder, [row] * 3), with_template(WITH_TOOLS))


def test_roles_of_a_templates_own_are_no_slips(folder):
    turns = [{"role": role, "content": "a"} for role in ("user1", "user_2", "judge", "ipython")]
    assert text_of(write(folder, [{"messages": turns}]), with_template(CHATML))
    names = write(folder, [{"messages": [{"role": "User", "content": "a"}]}])
    assert text_of(names, with_template("{% if messages[0].role == 'User' %}" + CHATML + "{% endif %}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "expected a tokenizer with a chat template"),
        (
            "{% if false %}{{ messages }}{% endif %} ",
            "expected text from the tokenizer's chat template, got nothing",
        ),
        ("{{ messages[9].content.x }}", "template takes, got one it refuses"),
        (
            "{% for %}",
            "expected a chat template of Jinja, got one that it refuses",
        ),
    ],
)
def test_a_template_that_makes_nothing(template, message, folder):
    names = write(folder, [{"messages": CHAT}] * 3)
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*({message})"):
        text_of(names, with_template(template))


# A loss on what the assistant says


def labels_of(item):
    return [None if i == -100 else CHARACTERS[i] for i in item["labels"].tolist()]


def test_loss_on_completions(folder):
    names = write(folder, [{"messages": [*CHAT, {"role": "assistant", "content": "no"}]}] * 3)
    rows = read_rows(Sources(names, loss_on="completions"), with_template(MARKED), 64)
    assert len(rows) == 3
    text = "".join(CHARACTERS[i] for i in rows[0]["input_ids"].tolist())
    assert text == "[user]hi<end>[assistant]yes<end>[assistant]no<end>"
    assert [c for c in labels_of(rows[0]) if c] == [*"yes", "<end>", *"no", "<end>"]
    first = labels_of(rows[0]).index("y")
    assert rows[0]["input_ids"][first - 1] == CHARACTERS.index("]")


def test_a_long_chat_is_cut_and_what_has_no_label_is_left_out(folder):
    names = write(folder, [{"messages": [{"role": "user", "content": "a" * 50}, CHAT[1]]}] * 9)
    tokenizer = with_template(MARKED)
    rows = read_rows(Sources(names, loss_on="completions"), tokenizer, 16)
    assert len(rows) == 9
    assert all(len(rows[k]["input_ids"]) <= 16 for k in range(9))

    def some(number, at=None):
        data = TokenStream(Sources(names, loss_on="completions"), tokenizer, 7, shuffled_rows=4)
        return [(tuple(r.tokens), tuple(r.labels), place) for r, place in islice(data.rows(at), number)]

    streamed = some(40)
    for k in (0, 2, 5, 9, 17, 30):
        assert some(3, streamed[k][2]) == streamed[k + 1 : k + 4]


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        (
            [{"messages": CHAT}],
            CHATML,
            "marks what the assistant says with {% generation %} .* got one without",
        ),
        (
            [{"messages": CHAT[:1]}],
            MARKED,
            "the assistant says something, got turns of user, and nothing said",
        ),
        (
            [{"messages": [CHAT[0], {"role": "assistant", "content": " ", "language": "English"}]}],
            MARKED,
            "the assistant says something, got turns of user, assistant, and nothing said",
        ),
        ([{"text": "prose"}], MARKED, "a chat, or prompt and completion, .* got a text"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], MARKED, "got labels of its own"),
    ],
)
def test_a_loss_on_completions_that_cannot_be(rows, template, message, folder):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        read_rows(Sources(write(folder, rows), loss_on="completions"), with_template(template), 64)
    (folder / "a.txt").write_text("prose")
    with pytest.raises(ValueError, match="a.txt: expected chats for a loss on completions .*, got a text"):
        read_rows(Sources(["a.txt"], loss_on="completions"), with_template(template), 64)


def test_prompt_and_completion_are_a_loss_on_completions_already(folder):
    names = write(folder, [{"prompt": "ab", "completion": "cd"}])
    one, other = (
        read_rows(Sources(names, loss_on=on), character_tokenizer(), 9) for on in ("all", "completions")
    )
    assert labels_of(one[0]) == labels_of(other[0]) == [None, None, "c", "d", "<end>"]
    with pytest.raises(ValueError, match="expected a loss on all or completions, got 'some'"):
        Sources(names, loss_on="some")


SMOLLM2 = (  # of HuggingFaceTB/SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "be kind "}]])
def test_the_marked_template_of_smollm2_renders_what_its_own_does(first):
    file = Path(__file__).parents[3] / "examples/chat_templates/smollm2.jinja"
    turns = [*first, {"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "yes\n "}]
    turns += [{"role": "user", "content": ""}, {"role": "assistant", "content": "no"}]
    own, marked = with_template(SMOLLM2), with_template(read_template(file))
    for chat in (turns, turns[:1], turns[:-1]):
        for asks in (False, True):
            texts = [
                t.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks) for t in (own, marked)
            ]
            assert texts[0] == texts[1]
    ids, mask = render_marked(Chat(turns), marked)
    said = "".join(CHARACTERS[i] if counts else "|" for i, counts in zip(ids, mask, strict=True))
    assert [part for part in said.split("|") if part] == ["yes\n <", "im_end", ">", "no<", "im_end", ">"]


def test_a_template_renders_for_one_thread_at_a_time():
    """transformers keeps what it finds of the marks in the compiled template, which all threads share."""
    tokenizer = with_template(MARKED)
    apply, inside, most = tokenizer.apply_chat_template, [], []

    def slow(*given, **more):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)  # time for another thread to come in
        inside.pop()
        return apply(*given, **more)

    tokenizer.apply_chat_template = slow
    threads = [threading.Thread(target=render, args=(Chat(CHAT), tokenizer)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
