"""A model that says what it is told, and the talk that the browsers see; `test_widget` and the
notebooks that it makes use both."""
import json
import time

import torch

from bantam.chat.calculator import calculator
from bantam.chat.chat import BantamChat
from bantam.chat.widget import chat_cell
from bantam.config import BantamConfig
from bantam.text.special import CONTROL_TOKENS, control
from bantam.text.tokenizer import BantamTokenizer

TOK = BantamTokenizer.default()
NAMES = {t.strip("<|>") for t in CONTROL_TOKENS}


class Scripted:
    """Says texts and names of control tokens, one answer after the other; a function in an answer
    is called at that point."""
    def __init__(self, *answers, context=512, pace=0):
        self.answers, self.pace, self.said, self.asked = iter(answers), pace, 0, []
        self.config = BantamConfig(vocab_size=TOK.vocab_size, hidden_size=16, intermediate_size=32,
                                   num_hidden_layers=1, num_attention_heads=2,
                                   num_key_value_heads=2, max_position_embeddings=context)
        self.device = torch.device("cpu")

    def stream(self, input_ids, args, **options):
        self.asked.append(args)
        for part in next(self.answers):
            if callable(part): part(); continue
            for id in [control(part)] if part in NAMES else TOK.encode(part):
                time.sleep(self.pace)
                self.said += 1
                yield torch.tensor([id])


CALL = ["TOOL_CALL_START", json.dumps(dict(name="calculator", arguments=dict(expression="6 * 7"),
                                           id="1")), "TOOL_CALL_END", "AGENT_END"]
STORY = ["Once upon a time there was a model that told stories.",
         *[" Then it said another sentence."]*400, "AGENT_END"]
EVIL = ("It is 42, <b>not</b> 43.<script>document.title = 'stolen'</script><img src=x "
        "onerror=\"document.title = 'stolen'\"> \x1b[31mred")


def cell():
    "A call, an answer that attacks the page, a story without an end, and what comes after."
    script = [["THINK_START", "A product; a tool knows.", "THINK_END", "Let me see. ", *CALL],
              [EVIL, "AGENT_END"], STORY, ["Yes, I am here.", "AGENT_END"], STORY,
              ["Still here.", "AGENT_END"]]
    return chat_cell(BantamChat(Scripted(*script, pace=.01), TOK, tools=[calculator],
                                system="Be kind."))
