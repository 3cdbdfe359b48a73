"""Synthetic text for pretraining the tiny base model.

Run ``python -m adaptax.assets.recipes.corpus`` to print samples.  The corpus teaches the words and the
slot values of ``chats``, how to pick slots out of a home request, and what JSON looks like.  It never
answers a home request with JSON, never uses the dataset's JSON keys, and leaves the held-out
combinations out: turning a request into a command is left for fine-tuning.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from adaptax.assets.recipes import chats

Row = dict[str, Any]

TRAIN, _ = chats.split()

# The plain-English confirmation of a home request; canonical values, in the order of the JSON's keys.
CONFIRMATIONS = {
    "switch": "switch the {room} {device} {state}",
    "dim": "dim the {room} {device} to {percent} percent",
    "heat": "heat the {room} to {degrees} degrees",
    "play": "play the {room} some {genre}",
    "timer": "set the {room} timer to {minutes} minutes",
}


def listed(text: str) -> list[str]:
    """Split a list of words."""
    return text.split()


NAMES = listed("""
    Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olivia Paul Quinn Rosa
    Sam Tara Uma Victor Wendy Xavier Yara Zoe
""")
CITIES = listed("Berlin Cairo Delhi Lima London Madrid Oslo Paris Quito Rome Tokyo Vienna Warsaw Zurich")
ANIMALS = listed("cat dog horse rabbit bird fish duck goat sheep fox bear mouse turtle frog cow pig owl bee")
THINGS = listed("""
    book cup ball box hat shoe coat chair table bottle pencil basket clock key letter map phone ring
    spoon plate bag bike boat car train kite drum picture mirror blanket pillow towel candle ladder
    hammer bucket umbrella jacket wallet ticket camera fan lamp kettle radio heater speaker
""")
COLOURS = listed("red blue green yellow black white brown grey orange purple pink silver gold")
PLACES = listed("""
    park school market river forest beach station library museum farm hill bridge village shop
    church harbour castle field lake street
""")
FOODS = listed("""
    bread soup rice cheese apple pear salad cake pasta egg honey butter tomato potato onion carrot
    banana lemon pie tea coffee milk juice sugar salt
""")
MOODS = listed("happy tired hungry quiet angry proud sleepy busy calm brave curious lonely cheerful worried")
SKIES = listed("sunny cloudy rainy windy snowy foggy stormy clear")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
NUMBERS = listed("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""")
VERBS = listed("""
    found lost bought sold carried painted washed cleaned hid dropped fixed broke borrowed wanted
    liked kept opened closed moved pushed pulled lifted
""")
WENT = listed("walked ran drove rode hurried travelled returned wandered")
OPPOSITES = """
    hot cold, big small, fast slow, up down, left right, open closed, early late, loud quiet, light
    dark, full empty, young old, happy sad, hard soft, wet dry, high low, near far, thick thin,
    strong weak, cheap expensive, clean dirty, first last, always never, inside outside, above
    below, push pull, start stop, lock unlock, on off, day night, summer winter, question answer,
    before after, true false, buy sell, give take, long short, deep shallow, rough smooth, sharp
    dull, heavy light, simple complex, rich poor, brave afraid, asleep awake, friend enemy, arrive
    leave, begin end, win lose, remember forget, north south, east west
"""
HUES = """
    grass green, snow white, coal black, blood red, the sky blue, a lemon yellow, a carrot orange,
    chocolate brown, an elephant grey, a tomato red, milk white, a banana yellow, the sea blue, a
    plum purple
"""
PAIRS = [pair.split() for pair in OPPOSITES.split(",")]
HUED = [" ".join(pair.split()).rsplit(" ", 1) for pair in HUES.split(",")]
DEVICES = sorted({str(value) for slots in chats.SLOTS.values() for value in slots.get("device", ())})
STOCK = {"place": "room", "item": "device"}
GENRES = [str(genre) for genre in chats.SLOTS["play"]["genre"]]

# Words by kind; the kinds are the dataset's key names, met here as quoted words in plain sentences.
KINDS: dict[str, list[str]] = {
    "action": list(chats.SLOTS),
    "room": list(chats.ROOMS),
    "device": DEVICES,
    "genre": GENRES,
    "state": ["on", "off"],
    "time": ["7:30", "11:45", "2:00", "9:15", "12:30", "4:00"],
    "percent": ["40%", "75%", "10%", "90%"],
    "degrees": ["18 degrees", "21 degrees", "25 degrees"],
    "minutes": ["5 minutes", "20 minutes", "45 minutes"],
}
WORDS = sorted(
    {*ANIMALS, *THINGS, *COLOURS, *PLACES, *FOODS, *MOODS, *SKIES, *NUMBERS, *KINDS}
    | {word for kind in KINDS.values() for word in kind if word.isalpha()}
    | {word for pair in PAIRS for word in pair}
)

# Descriptions, and their records: JSON key to field (see record_fields); other strings are constants.
RECORDS: tuple[tuple[str, dict[str, str]], ...] = (
    ("the {its_room} {its_device}, price {many}", {"kind": "stock", **STOCK, "price": "many"}),
    ("{many} euros for the {its_device} in the {its_room}", {"kind": "stock", **STOCK, "price": "many"}),
    ("the {its_device} in the {its_room}, seen {on_off}", {"kind": "seen", **STOCK, "status": "on_off"}),
    (
        "the {its_room} {its_device}, seen {on_off} at {hour}",
        {"kind": "seen", **STOCK, "status": "on_off", "hour": "hour"},
    ),
    ("at {hour}, the {its_device} in the {its_room}, sold", {"kind": "sale", **STOCK, "hour": "hour"}),
    (
        "{few} {hue} {its_device} boxes in the {its_room}",
        {"kind": "stock", **STOCK, "colour": "hue", "count": "few"},
    ),
    ("one {hue} {thing}, {many} euros", {"kind": "sale", "item": "thing", "colour": "hue", "price": "many"}),
    (
        "{many} {genre} songs for the {its_room}",
        {"kind": "music", "place": "room", "style": "genre", "count": "many"},
    ),
    ("{genre} by {person} at {hour}", {"kind": "music", "style": "genre", "by": "person", "hour": "hour"}),
    (
        "the {part} button, {its_room}, number {many}",
        {"kind": "button", "label": "part", "place": "room", "number": "many"},
    ),
    ("the {hue} car with {few} doors", {"kind": "car", "colour": "hue", "doors": "few"}),
    (
        "{sky} in {town}, wind {many}",
        {"kind": "weather", "city": "town", "sky": "sky", "wind": "many"},
    ),
    ("bus {many} to {town} leaves at {hour}", {"kind": "bus", "line": "many", "to": "town", "hour": "hour"}),
    (
        "{many} grams of {dish}, ready at {hour}",
        {"kind": "meal", "food": "dish", "grams": "many", "hour": "hour"},
    ),
    (
        "{person} the {animal}, {few} years old",
        {"kind": "pet", "pet": "animal", "name": "person", "age": "few"},
    ),
)
ASK_RECORD = ("Write a record", "Make a record", "Write JSON", "Give me a JSON record", "As a record")


def clock(rng: random.Random) -> str:
    """Pick a time of day."""
    return f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"


def an(word: str) -> str:
    """Put the indefinite article before a word."""
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def said(rng: random.Random, value: str) -> str:
    """Say a canonical value in one of its spoken forms."""
    return rng.choice(chats.SPOKEN.get(value, (value,)))


def home(rng: random.Random) -> Row:
    """Answer a home request with a confirmation that repeats every slot."""
    command = chats.draw(rng, TRAIN)
    action = str(command["action"])
    text = CONFIRMATIONS.get(action, "{action} the {room} {device}").format(**command)
    when = f" at {command['time']}" if "time" in command else ""
    return chats.chat(chats.request(rng, command), f"Okay, I will {text}{when}.")


def arithmetic(rng: random.Random) -> Row:
    """Add, subtract, or write a number as a word."""
    first, second = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return rng.choice(
        (
            chats.chat(f"What is {first} plus {second}?", f"{first} plus {second} is {first + second}."),
            chats.chat(f"What is {first} minus {second}?", f"{first} minus {second} is {first - second}."),
            chats.chat(f"Write {first} as a word.", f"{first} is {NUMBERS[first]}."),
            chats.chat(f"Which is larger, {first} or {second + 21}?", f"{second + 21} is larger."),
        )
    )


def words(rng: random.Random) -> Row:
    """Spell a word, give an opposite, or name the kind of a word."""
    word, pair = rng.choice(WORDS), rng.sample(rng.choice(PAIRS), 2)
    kind = rng.choice(list(KINDS))
    member = rng.choice(KINDS[kind])
    return rng.choice(
        (
            chats.chat(f"How do you spell {word}?", f'The word "{word}" is spelled {"-".join(word)}.'),
            chats.chat(f'How many letters are in "{word}"?', f'The word "{word}" has {len(word)} letters.'),
            chats.chat(f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."),
            chats.chat(f"Which kind of word is {member}?", f'Here "{member}" is of the kind "{kind}".'),
            chats.chat(f"Name a word of the kind {kind}.", f'One word of the kind "{kind}" is "{member}".'),
        )
    )


def facts(rng: random.Random) -> Row:
    """Ask about colours, days and months."""
    thing, hue = rng.choice(HUED)
    names, noun = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    place = rng.randrange(len(names))
    name, following = names[place], names[(place + 1) % len(names)]
    city, sky = rng.choice(CITIES), rng.choice(SKIES)
    return rng.choice(
        (
            chats.chat(rng.choice(("Hello", "Hi", "Hello!", "Good morning.")), "Hello! How can I help you?"),
            chats.chat(f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {hue}."),
            chats.chat(f"Which {noun} comes after {name}?", f"{following} comes after {name}."),
            chats.chat(f"Which {noun} comes before {following}?", f"{name} comes before {following}."),
            chats.chat(f"It is {sky} in {city}. How is the weather?", f"The weather in {city} is {sky}."),
        )
    )


def record_fields(rng: random.Random) -> dict[str, str | int]:
    """Pick the values that a record may use."""
    room, device = rng.choice(chats.ROOMS), rng.choice(DEVICES)
    return {
        "room": room,
        "its_room": said(rng, room),
        "device": device,
        "its_device": said(rng, device),
        "genre": rng.choice(GENRES),
        "part": rng.choice(list(chats.SLOTS)),
        "on_off": rng.choice(("on", "off")),
        "hour": clock(rng),
        "few": rng.randint(2, 12),
        "many": rng.randint(10, 99),
        "thing": rng.choice(THINGS),
        "hue": rng.choice(COLOURS),
        "person": rng.choice(NAMES),
        "town": rng.choice(CITIES),
        "sky": rng.choice(SKIES),
        "animal": rng.choice(ANIMALS),
        "dish": rng.choice(FOODS),
    }


def record(rng: random.Random) -> tuple[str, str]:
    """Describe something, and give the JSON record of it."""
    fields = record_fields(rng)
    text, keys = rng.choice(RECORDS)
    return text.format(**fields), json.dumps({key: fields.get(field, field) for key, field in keys.items()})


def record_chat(rng: random.Random) -> Row:
    """Ask for a JSON record."""
    text, made = record(rng)
    return chats.chat(f"{rng.choice(ASK_RECORD)}: {text}{rng.choice(('.', ''))}", made)


def record_page(rng: random.Random) -> Row:
    """List a few JSON records, one a line."""
    made = [record(rng)[1] for _ in range(rng.randint(1, 3))]
    return {"text": "\n".join([rng.choice(("Records:", "List:", "A page of records.")), *made])}


def sentence(rng: random.Random, name: str) -> str:
    """Tell one thing about somebody."""
    thing, room, place = rng.choice(THINGS), rng.choice(chats.ROOMS), rng.choice(PLACES)
    colour, mood, food, animal = (rng.choice(group) for group in (COLOURS, MOODS, FOODS, ANIMALS))
    friend, number = rng.choice(NAMES), rng.choice(NUMBERS[2:])
    return rng.choice(
        (
            f"{name} {rng.choice(VERBS)} {an(colour)} {thing} in the {room}.",
            f"Then {name} {rng.choice(WENT)} to the {place} with {friend}.",
            f"{name} was {mood} because the {animal} ate the {food}.",
            f"There were {number} {animal} pictures near the {place}.",
            f"At {clock(rng)} it was {rng.choice(SKIES)}, and {name} felt {mood}.",
            f'"Where is my {thing}?" asked {friend}. "It is in the {room}," said {name}.',
            f"On {rng.choice(DAYS)} they listened to {rng.choice(GENRES)} music and had some {food}.",
            f"The {said(rng, room)} had {an(colour)} wall and a new {said(rng, rng.choice(DEVICES))}.",
            f"{name} said: thank you, {friend}! That's {rng.choice(('very', 'so', 'really'))} kind of you.",
        )
    )


def story(rng: random.Random) -> Row:
    """Tell a short story."""
    name = rng.choice(NAMES)
    start = f"{name} lived near {an(rng.choice(PLACES))} in {rng.choice(CITIES)}."
    return {"text": " ".join([start, *(sentence(rng, name) for _ in range(rng.randint(1, 3)))])}


MIXTURE: dict[Callable[[random.Random], Row], int] = {
    home: 45, record_chat: 22, record_page: 8, words: 10, arithmetic: 4, facts: 4, story: 7,
}  # fmt: skip


def rows(seed: int, count: int) -> Iterator[Row]:
    """Yield chat rows and plain documents, the same ones for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(MIXTURE), list(MIXTURE.values())
    for _ in range(count):
        yield rng.choices(kinds, weights)[0](rng)


def main() -> None:
    """Print 20 samples."""
    for row in rows(seed=0, count=20):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
