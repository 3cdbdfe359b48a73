"""Home requests and their one-line JSON commands: the quickstart's chat dataset.

Run ``python -m adaptax.assets.recipes.chats`` to write ``home/train.jsonl`` and ``home/eval.jsonl``.
A command is a combination (action, room, device or value), plus an optional time.  The combinations
are split once: those held out appear in the evaluation rows only, so a model that scores well there
has learnt to fill in slots rather than to recall whole rows.
"""

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

Command = dict[str, str | int]
Commands = dict[str, list[Command]]
Row = dict[str, list[dict[str, str]]]

HOME = Path(__file__).resolve().parents[1] / "home"
SEED = 2024
TRAIN_ROWS = 2000
EVAL_ROWS = 200
HELD_OUT_SHARE = 0.15

ROOMS = ("kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "garage", "garden")

# Each action's slots besides the room, in the order in which the JSON lists them.
SLOTS: dict[str, dict[str, tuple[str, ...] | tuple[int, ...]]] = {
    "switch": {"device": ("lamp", "fan", "heater", "tv", "speaker", "camera"), "state": ("on", "off")},
    "dim": {
        "device": ("lamp", "ceiling light", "screen"),
        "percent": (10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90),
    },
    "heat": {"degrees": tuple(range(15, 27))},
    "play": {"genre": ("jazz", "rock", "pop", "folk", "blues", "classical", "techno", "reggae")},
    "timer": {"minutes": (3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 45, 60)},
    "stop": {"device": ("music", "radio", "alarm", "podcast")},
    "lock": {"device": ("door", "window", "gate", "cabinet")},
    "unlock": {"device": ("door", "window", "gate", "cabinet")},
    "open": {"device": ("blinds", "curtains", "shutters")},
    "close": {"device": ("blinds", "curtains", "shutters")},
}
KEYS = ("action", "room", "device", "state", "percent", "degrees", "genre", "minutes", "time")
WEIGHTS = {"switch": 2, "dim": 2, "heat": 2, "play": 2, "timer": 2}

# How a canonical value may be said; a value that is not listed is said as it is.
SPOKEN = {
    "living room": ("living room", "living room", "lounge"),
    "office": ("office", "office", "study"),
    "hallway": ("hallway", "hallway", "hall"),
    "garden": ("garden", "garden", "backyard"),
    "tv": ("tv", "tv", "television"),
    "curtains": ("curtains", "curtains", "drapes"),
}
VERBS = {"close": ("close", "shut"), "stop": ("stop", "end")}
DONE = {"stop": "stopped", "lock": "locked", "unlock": "unlocked", "open": "open", "close": "closed"}

# Templates that give an order; a polite opening such as "could you" may come before them.
SIMPLE_ORDERS = (
    "{verb} the {room} {device}",
    "{verb} the {device} in the {room}",
    "have the {room} {device} {done}",
    "go and {verb} the {room} {device}",
    "get the {device} in the {room} {done}",
)
ORDERS = {
    "switch": (
        "turn {state} the {room} {device}",
        "turn the {room} {device} {state}",
        "turn the {device} in the {room} {state}",
        "switch {state} the {device} in the {room}",
        "switch the {room} {device} {state}",
        "switch {state} the {room} {device}",
    ),
    "dim": (
        "dim the {room} {device} to {percent} percent",
        "set the {room} {device} to {percent} percent",
        "set the {device} in the {room} to {percent}%",
        "put the {room} {device} at {percent}% brightness",
        "change the brightness of the {room} {device} to {percent}",
        "bring the {device} in the {room} to {percent} percent",
    ),
    "heat": (
        "heat the {room} to {degrees} degrees",
        "set the {room} to {degrees} degrees",
        "make it {degrees} degrees in the {room}",
        "warm the {room} up to {degrees}",
        "set the temperature in the {room} to {degrees}",
        "bring the {room} to {degrees} degrees",
    ),
    "play": (
        "play {genre} in the {room}",
        "play some {genre} music in the {room}",
        "put on some {genre} in the {room}",
        "put {genre} music on in the {room}",
        "start the {room} {genre} playlist",
        "fill the {room} with {genre}",
    ),
    "timer": (
        "set a {minutes} minute timer in the {room}",
        "set a timer for {minutes} minutes in the {room}",
        "start a {room} timer for {minutes} minutes",
        "set the {room} timer to {minutes} minutes",
        "count down {minutes} minutes in the {room}",
        "time {minutes} minutes in the {room}",
    ),
}

# Templates that state a wish; they stand alone.
SIMPLE_WISHES = (
    "I want the {room} {device} {done}",
    "{verb} {room} {device}",
    "the {device} in the {room} should be {done}",
)
WISHES = {
    "switch": (
        "{room} {device} {state}",
        "I want the {room} {device} {state}",
        "the {device} in the {room} should be {state}",
    ),
    "dim": (
        "{room} {device} {percent} percent",
        "I want the {room} {device} at {percent}%",
        "brightness {percent} for the {device} in the {room}",
    ),
    "heat": (
        "{room} {degrees} degrees",
        "I want the {room} at {degrees} degrees",
        "{degrees} degrees in the {room}",
    ),
    "play": ("{genre} in the {room}", "I want to hear {genre} in the {room}", "{room} music, {genre}"),
    "timer": (
        "{room} timer {minutes} minutes",
        "{minutes} minute timer, {room}",
        "I need a timer in the {room}, {minutes} minutes",
    ),
}
OPENINGS = ("could you", "can you", "would you", "can you please", "please", "I would like you to")


def combinations(action: str) -> list[Command]:
    """List every command for an action, without a time."""
    slots = {"room": ROOMS, **SLOTS[action]}
    return [{"action": action, **dict(zip(slots, values, strict=True))} for values in product(*slots.values())]


def split() -> tuple[Commands, Commands]:
    """Divide the combinations, action by action, into those for training and those held out."""
    rng = random.Random(SEED)
    train: Commands = {}
    held_out: Commands = {}
    for action in SLOTS:
        commands = combinations(action)
        rng.shuffle(commands)
        cut = round(len(commands) * HELD_OUT_SHARE)
        held_out[action], train[action] = commands[:cut], commands[cut:]
    return train, held_out


def draw(rng: random.Random, commands: Commands) -> Command:
    """Pick an action by weight and one of its commands, and sometimes add a time."""
    action = rng.choices(list(SLOTS), [WEIGHTS.get(action, 1) for action in SLOTS])[0]
    command = dict(rng.choice(commands[action]))
    if action != "timer" and rng.random() < 0.35:
        command["time"] = f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
    return command


def say_time(rng: random.Random, time: str) -> str:
    """Say a time of day; a full hour is sometimes said with "o'clock"."""
    hour, minute = time.split(":")
    return f"at {hour} o'clock" if minute == "00" and rng.random() < 0.5 else f"at {time}"


def request(rng: random.Random, command: Command) -> str:
    """Say a command the way a person might."""
    action = str(command["action"])
    words = {key: rng.choice(SPOKEN.get(str(value), (str(value),))) for key, value in command.items()}
    words |= {"verb": rng.choice(VERBS.get(action, (action,))), "done": DONE.get(action, "")}
    wish = rng.random() < 0.25
    templates = WISHES.get(action, SIMPLE_WISHES) if wish else ORDERS.get(action, SIMPLE_ORDERS)
    text = rng.choice(templates).format(**words)
    opening = rng.choice(OPENINGS) if not wish and rng.random() < 0.45 else ""
    text = f"{opening} {text}" if opening else text
    if "time" in command:
        when = say_time(rng, str(command["time"]))
        text = f"{when}, {text}" if rng.random() < 0.3 else f"{text} {when}"
    if "please" not in opening and rng.random() < 0.25:
        text += rng.choice((" please", ", please", ", thanks"))
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + ("?" if opening.startswith(("c", "w")) else ".")
    return text


def answer(command: Command) -> str:
    """Write a command as strict one-line JSON, its keys in their fixed order."""
    return json.dumps({key: command[key] for key in KEYS if key in command})


def chat(user: str, assistant: str) -> Row:
    """Make a one-turn chat row."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def rows(rng: random.Random, commands: Commands) -> Iterator[Row]:
    """Yield rows for these commands without end, no request twice."""
    seen: set[str] = set()
    while True:
        command = draw(rng, commands)
        text = request(rng, command)
        if text.lower() not in seen:
            seen.add(text.lower())
            yield chat(text, answer(command))


def datasets() -> tuple[list[Row], list[Row]]:
    """Make the training and the evaluation rows."""
    train, held_out = split()
    train_rows = rows(random.Random(SEED + 1), train)
    eval_rows = rows(random.Random(SEED + 2), held_out)
    return [next(train_rows) for _ in range(TRAIN_ROWS)], [next(eval_rows) for _ in range(EVAL_ROWS)]


def check(train: list[Row], evaluation: list[Row]) -> None:
    """Assert that no row repeats, no combination is shared, and every single value was trained on."""
    requests = [row["messages"][0]["content"] for row in train + evaluation]
    assert len(set(requests)) == len(requests), "a request occurs twice"
    trained, asked = (
        [json.loads(row["messages"][1]["content"]).items() for row in part] for part in (train, evaluation)
    )
    seen = {frozenset(item for item in items if item[0] != "time") for items in trained}
    unseen = {frozenset(item for item in items if item[0] != "time") for items in asked}
    assert not seen & unseen, "a held-out combination occurs in train"
    values = {(action, item) for (_, action), *slots in trained for item in slots}
    needed = {(action, item) for (_, action), *slots in asked for item in slots if item[0] != "time"}
    assert needed <= values, "an evaluation value never occurs in train with its action"
    times = {item for items in trained for item in items if item[0] == "time"}
    assert {item for items in asked for item in items if item[0] == "time"} <= times, "an untrained time"


def main() -> None:
    """Write the two files."""
    train, evaluation = datasets()
    check(train, evaluation)
    HOME.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("eval", evaluation)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (HOME / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main()
