"""Synthetic support tickets with gold answers, from a seed: what the shipped model learnt, and the demo's corpus.

Knows no model and no pipeline. The task: read a ticket, answer with one JSON object that names product, problem and
urgency, and copies the order number. Numbers that are not the order number, a second product, typos and sloppy
writing are there to be seen through. Called by `jobs.demo.train`, `jobs.demo.main` and the tests.
"""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PRODUCTS: dict[str, tuple[str, ...]] = {
    "laptop": ("laptop", "notebook", "ultrabook", "gaming laptop"),
    "phone": ("phone", "smartphone", "mobile phone", "handset"),
    "tablet": ("tablet", "drawing tablet", "e-reader"),
    "monitor": ("monitor", "display", "4K monitor", "curved monitor"),
    "printer": ("printer", "laser printer", "inkjet", "photo printer"),
    "router": ("router", "wifi router", "mesh router"),
    "camera": ("camera", "camcorder", "mirrorless camera", "action cam"),
    "speaker": ("speaker", "soundbar", "bluetooth speaker"),
    "keyboard": ("keyboard", "mechanical keyboard", "wireless keyboard"),
    "watch": ("watch", "smartwatch", "fitness tracker"),
}

# {p} is the product, {q} a product of another kind.
PROBLEMS: dict[str, tuple[str, ...]] = {
    "damaged": (
        "The {p} arrived with a crack right across the front.",
        "The box was crushed and the {p} inside is scratched all over.",
        "My new {p} came broken, one corner is bent.",
        "When I unpacked the {p} the casing was already dented.",
        "The courier must have dropped it: the {p} is in pieces.",
        "I received a {p} with visible damage on the back.",
        "The {p} reached me smashed.",
        "There is a deep scratch on the {p}, straight out of the package.",
        "One side of the {p} is bent and the paint is chipped.",
        "The glass of the {p} was broken when I opened the parcel.",
        "It looks as if somebody stepped on the {p}, it is cracked.",
    ),
    "late": (
        "My {p} still has not arrived.",
        "The {p} was supposed to be here last week.",
        "I am still waiting for the {p} I bought.",
        "The tracking page for my {p} has not moved for days.",
        "Where is my {p}? It should have been delivered by now.",
        "The delivery of the {p} is overdue.",
        "It has been {n} days and there is no sign of my {p}.",
        "The parcel with the {p} seems to be stuck at the depot.",
        "The {p} was promised for Monday and nobody has delivered it.",
        "How much longer do I have to wait for the {p}?",
        "The {p} has been in transit for {n} days.",
    ),
    "wrong_item": (
        "I ordered a {p} but received a {q}.",
        "You sent me a {q} instead of the {p}.",
        "There was a {q} in the box, not the {p} I paid for.",
        "I got somebody else's {q}; I had bought a {p}.",
        "The {p} I chose was swapped for a {q}.",
        "Instead of my {p} the parcel contained a {q}.",
        "This is not the {p} I ordered, it is a {q}!",
        "You delivered the wrong thing: a {q}, and my order was for a {p}.",
        "Somebody mixed up the parcels: I wanted a {p} and have a {q} here.",
        "The label says {p}, but inside is a {q}.",
        "Why did I get a {q} when I paid for a {p}?",
    ),
    "missing_part": (
        "The {p} came without its power cable.",
        "There was no adapter in the box with the {p}.",
        "The {p} is here but the charger is missing.",
        "I cannot find the screws that belong to the {p}.",
        "The manual and the cable of the {p} were not in the package.",
        "Half of the accessories of my {p} are missing.",
        "You forgot to pack the stand that goes with the {p}.",
        "My {p} was delivered incomplete, the cover is not there.",
        "The {p} lacks the remote that the page promises.",
        "I unpacked the {p} and there is no cable for it.",
        "Two of the parts of the {p} were left out of the box.",
    ),
    "no_power": (
        "The {p} does not turn on any more.",
        "My {p} is completely dead.",
        "Nothing happens when I press the power button on the {p}.",
        "The {p} shuts down by itself every few minutes.",
        "I plugged in the {p} and it will not start.",
        "Since this morning the {p} refuses to boot.",
        "The {p} stays black whatever I do.",
        "My {p} switches off after {n} seconds.",
        "The {p} died after {n} days and cannot be switched on.",
        "No light, no sound: the {p} does not start.",
        "However long I charge the {p}, it will not power up.",
    ),
    "no_connection": (
        "The {p} will not connect to my network.",
        "My {p} keeps losing the wifi signal.",
        "Pairing the {p} over bluetooth fails every time.",
        "My computer does not recognise the {p}.",
        "The {p} is offline all the time, even next to the access point.",
        "I cannot get the {p} to link with anything.",
        "The connection of the {p} drops every {n} minutes.",
        "The {p} finds no network at all.",
        "The {p} is never found when I search for it from my computer.",
        "The {p} says there is no signal.",
        "Setting up the network on the {p} ends with an error each time.",
    ),
    "refund": (
        "I sent the {p} back and never got my money.",
        "You promised a refund for the {p} but nothing has come.",
        "I am waiting for the money for the {p} I returned.",
        "The {p} went back to you {n} weeks ago, when will I be reimbursed?",
        "I returned the {p} and my account has not been credited.",
        "Please pay back what I spent on the {p}, you have had it for weeks.",
        "The refund for my {p} has not shown up on my card.",
        "My {p} is back in your warehouse, so where is my refund?",
        "Where is the money for the {p} that I gave back?",
        "The return of the {p} was accepted, the repayment never came.",
        "Your shop still owes me the price of the {p} I sent back.",
    ),
    "billing": (
        "I was charged twice for the {p}.",
        "The invoice for the {p} shows the wrong amount.",
        "You billed me more for the {p} than the price on the page.",
        "There are two payments on my card for one {p}.",
        "The discount code was not applied to my {p}.",
        "I was billed for {n} units although I bought a single {p}.",
        "The bill for the {p} has the wrong tax on it.",
        "My bank shows a double charge for the {p}.",
        "The amount on the receipt of the {p} is not what I agreed to.",
        "I see an extra fee on the bill for the {p}.",
        "You took the price of the {p} from my account two times.",
    ),
    "cancel": (
        "I would like to cancel my {p}.",
        "Please stop the shipment of the {p}, I do not need it any more.",
        "I changed my mind about the {p}, can you call it off?",
        "I ordered the {p} by mistake, please undo it.",
        "Do not send the {p}, I found another one.",
        "Is it still possible to withdraw from buying the {p}?",
        "Kindly cancel the {p} before it ships.",
        "I no longer want the {p}.",
        "Please take the {p} out of my order, I do not want it.",
        "We have decided against the {p}, kindly annul the purchase.",
        "I have to call off the purchase of the {p}.",
    ),
}

URGENCIES: dict[str, tuple[str, ...]] = {
    "low": (
        "There is no rush.",
        "Take your time.",
        "Answer whenever you get a chance.",
        "It is not urgent at all.",
        "Any time this month is fine.",
        "No hurry on my side.",
        "Just look at it when things are quiet.",
        "This can wait.",
    ),
    "normal": (
        "",
        "",
        "",
        "I look forward to your reply.",
        "What are the next steps?",
        "Please let me know what to do.",
        "Can you help?",
        "I would be glad to hear from you.",
    ),
    "high": (
        "This is urgent!",
        "I need this solved by {day}.",
        "Please reply as soon as possible.",
        "I have a client meeting on {day} and cannot do without it.",
        "ASAP please.",
        "I need an answer today.",
        "My work has stopped because of this.",
        "This is the third time I write, act now!",
        "Please treat it as an emergency.",
        "I cannot wait any longer.",
        "It has to work again by tomorrow.",
    ),
}

# {order} is filled last, after typos and lower-casing: it must stand in the text as in the gold answer.
ORDERS = (
    "The order number is {order}.",
    "My order was {order}.",
    "Order {order}.",
    "It is about order {order}.",
    "Order no. {order}, placed on {date}.",
    "I placed order {order} in {month}.",
    "(order {order})",
    "Order reference: {order}",
    "You will find it under order {order}.",
    "Bought with order number {order}.",
    "The confirmation says order {order}.",
    "order# {order}",
)
NO_ORDER = (
    "",
    "",
    "I cannot find the order number.",
    "I lost the order confirmation.",
    "I have no order number at hand.",
)
# Numbers that are not the order number; {code} is written as order numbers are.
DISTRACTORS = (
    "You can call me on {phone}.",
    "My phone is {phone}, evenings only.",
    "My customer number is {digits}.",
    "The serial number is {code}.",
    "My last ticket was {code}.",
    "I paid ${price}.",
    "It cost {price} dollars.",
    "I have been a customer since {year}.",
    "My postcode is {digits}.",
    "The courier gave me the code {code}.",
    "The label on the back says {code}.",
    "I already called {n} times.",
)
# Neither a problem nor an urgency.
REMARKS = (
    "It was meant as a birthday present.",
    "I use it every day for my studies.",
    "I attached two photos.",
    "My sister recommended your shop to me.",
    "Your website was easy to use, by the way.",
    "I work from home.",
    "I bought it in the spring sale.",
    "My neighbour had the same trouble.",
    "I have read the help pages already.",
    "The colour is lovely, I must say.",
    "I have been happy with you so far.",
    "I live on the third floor.",
    "We are a small design studio.",
    "The driver was very friendly.",
    "I usually write in Spanish, sorry for my English.",
    "My son tried to help me with it.",
    "Nobody answers the telephone at your place.",
    "I wrote to the chat before.",
)
GREETINGS = ("Hi,", "Hello,", "Hello there,", "Dear support team,", "Good morning,", "Hey,", "To whom it may concern,")
CLOSINGS = ("Thanks,", "Thank you,", "Best regards,", "Kind regards,", "Cheers,", "Many thanks,", "Regards,")
NAMES = (
    *("Ada", "Amir", "Anna", "Ben", "Bruno", "Carla", "Chen", "Clara", "Dana", "David", "Elena", "Emma", "Farid"),
    *("Grace", "Hana", "Hugo", "Ines", "Ivan", "Jonas", "Julia", "Kenji", "Lara", "Leo", "Lina", "Luca", "Maria"),
    *("Marta", "Mei", "Nadia", "Nils", "Noor", "Olga", "Omar", "Paula", "Priya", "Rosa", "Sam", "Sofia", "Tom", "Vera"),
)
ADJECTIVES = ("new", "black", "silver", "white", "small", "big", "refurbished", "cheap", "expensive", "blue")
BRANDS = ("Norvik", "Aldera", "Pico", "Tero X2", "Lumo", "Kestrel 5", "Vanta", "Orbit Pro", "Brightline", "Zeno 300")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

SHARE_WITHOUT_ORDER = 0.08
SHARE_LOWER_CASE = 0.12
SHARE_WITH_TYPOS = 0.35
SHARE_DUPLICATES = 0.05
SHARE_BAD = 0.005


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a customer wrote, and the JSON text that answers it."""

    text: str
    gold: str


def make_ticket(rng: random.Random) -> Ticket:
    """One ticket; consumes only `rng`, so the same state gives the same ticket."""
    product, other = rng.sample(list(PRODUCTS), 2)
    problem = rng.choice(list(PROBLEMS))
    urgency = rng.choice(list(URGENCIES))
    order = None if rng.random() < SHARE_WITHOUT_ORDER else _order_number(rng)

    complaint = _complain(
        rng, rng.choice(PROBLEMS[problem]), rng.choice(PRODUCTS[product]), rng.choice(PRODUCTS[other])
    )
    sentences = [complaint, rng.choice(NO_ORDER if order is None else ORDERS), rng.choice(URGENCIES[urgency])]
    sentences += rng.sample(DISTRACTORS, rng.choice((0, 0, 1, 1, 2)))
    sentences += rng.sample(REMARKS, rng.choice((0, 0, 1, 1, 2)))
    if rng.random() < 0.5:  # half of the tickets start with the complaint
        rng.shuffle(sentences)
    text = _frame(rng, " ".join(sentence for sentence in sentences if sentence))
    text = _write_sloppily(rng, _fill(rng, text))
    gold = {"product": product, "problem": problem, "urgency": urgency, "order": order}
    return Ticket(text.replace("{order}", order or ""), json.dumps(gold))


def make_tickets(num_tickets: int, seed: int) -> list[Ticket]:
    """`num_tickets` independent tickets; a longer list starts with the shorter one."""
    rng = random.Random(f"tickets {seed}")
    return [make_ticket(rng) for _ in range(num_tickets)]


def _order_number(rng: random.Random) -> str:
    """One of three formats: A-48213, QK204817, 48-20193."""
    kind = rng.randrange(3)
    if kind == 0:
        return f"{rng.choice(LETTERS)}-{_digits(rng, 5)}"
    if kind == 1:
        return f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}{_digits(rng, 6)}"
    return f"{_digits(rng, 2)}-{_digits(rng, 5)}"


def _digits(rng: random.Random, num_digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(num_digits))


def _complain(rng: random.Random, complaint: str, product: str, other: str) -> str:
    """Fill {p} and {q}, with a brand, an adjective or another article now and then."""
    if rng.random() < 0.3:
        product = f"{rng.choice(BRANDS)} {product}"
    if rng.random() < 0.2:
        product = f"{rng.choice(ADJECTIVES)} {product}"
    if rng.random() < 0.4:
        article = rng.choice(("my", "our", "this"))
        complaint = complaint.replace("The {p}", f"{article.capitalize()} {{p}}")
        complaint = re.sub(r"\bthe \{p\}(?! I )", f"{article} {{p}}", complaint)  # not "my phone I ordered"
    return complaint.replace("{p}", product).replace("{q}", other)


def _frame(rng: random.Random, body: str) -> str:
    """Put a greeting before and a signature after, each in most tickets, some on lines of their own."""
    name = rng.choice(NAMES)
    gap = "\n" if rng.random() < 0.25 else " "
    if rng.random() < 0.7:
        introduction = f" this is {name}." if rng.random() < 0.2 else ""
        body = f"{rng.choice(GREETINGS)}{introduction}{gap}{body}"
    if rng.random() < 0.6:
        body = f"{body}{gap}{rng.choice(CLOSINGS)} {name}"
    return body


def _fill(rng: random.Random, text: str) -> str:
    """Replace every placeholder but {order}."""
    values = {
        "{n}": str(rng.randint(2, 14)),
        "{day}": rng.choice(DAYS),
        "{date}": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
        "{month}": rng.choice(MONTHS),
        "{phone}": f"555-{_digits(rng, 4)}",
        "{digits}": _digits(rng, 5),
        "{price}": f"{rng.randint(20, 999)}.{rng.choice(('00', '50', '90', '99'))}",
        "{year}": str(rng.randint(2009, 2025)),
    }
    while "{code}" in text:
        text = text.replace("{code}", _order_number(rng), 1)
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)  # "an ultrabook", "an Orbit Pro camera"


def _write_sloppily(rng: random.Random, text: str) -> str:
    """Lower-case some tickets, and in some misspell one to three words; never in a word with a digit or placeholder."""
    if rng.random() < SHARE_LOWER_CASE:
        text = text.lower()
    if rng.random() >= SHARE_WITH_TYPOS:
        return text
    words = text.split(" ")
    candidates = [i for i, word in enumerate(words) if len(word) > 3 and word.strip(".,:;!?'").isalpha()]
    for i in rng.sample(candidates, min(len(candidates), rng.randint(1, 3))):
        words[i] = _misspell(rng, words[i])
    return " ".join(words)


def _misspell(rng: random.Random, word: str) -> str:
    """Drop, double or swap one inner letter."""
    i = rng.randrange(1, len(word) - 2)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:i] + word[i + 1 :]
    if kind == 1:
        return word[:i] + word[i] + word[i:]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


_EXAMPLES = (
    Ticket(
        "Hello, the display I bought stays black. No hurry. The serial number is K-30917. Order 71-40822. Thanks, Iris",
        '{"product": "monitor", "problem": "no_power", "urgency": "low", "order": "71-40822"}',
    ),
    Ticket(
        "You sent me a soundbar instead of the Norvik handset!! order# QD550316. I need an answer today.",
        '{"product": "phone", "problem": "wrong_item", "urgency": "high", "order": "QD550316"}',
    ),
)

INSTRUCTION = "\n".join(
    (
        "Read the support ticket and answer with one JSON object.",
        f"product: what the customer ordered, one of {', '.join(PRODUCTS)}.",
        f"problem: one of {', '.join(PROBLEMS)}.",
        f"urgency: {', '.join(URGENCIES)}.",
        "order: the order number exactly as written, or null.",
        *(f"\nTicket: {example.text}\n{example.gold}" for example in _EXAMPLES),
    )
)
"""The system prompt of every row: the shared prefix."""


def write_corpus(directory: Path, num_rows: int, num_shards: int = 4, seed: int = 0) -> list[Path]:
    """Write `num_rows` tickets as Parquet shards with columns id, ticket, gold, and return their paths.

    About one row in twenty repeats an earlier one word for word, and one in two hundred has a null or empty ticket
    (its gold is null): so that deduplication and error rows have something to show. A shard that is there already
    is left alone, so that a run over it finds its work done; other tickets-*.parquet are removed.
    """
    rows = _corpus_rows(num_rows, random.Random(f"corpus {seed}"))
    num_shards = min(num_shards, num_rows)
    directory.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("id", pa.string()), ("ticket", pa.string()), ("gold", pa.string())])
    paths = []
    for shard in range(num_shards):
        first, last = shard * num_rows // num_shards, (shard + 1) * num_rows // num_shards
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[first:last], schema=schema), sink)
        path = directory / f"tickets-{shard:03d}.parquet"
        if not path.exists() or path.read_bytes() != sink.getvalue():
            path.write_bytes(sink.getvalue())
        paths.append(path)
    for stale in set(directory.glob("tickets-*.parquet")) - set(paths):
        stale.unlink()
    return paths


def _corpus_rows(num_rows: int, rng: random.Random) -> list[dict[str, str | None]]:
    rows: list[dict[str, str | None]] = []
    for i in range(num_rows):
        row = {"id": f"ticket-{i:06d}"}
        draw = rng.random()
        if draw < SHARE_BAD:
            rows.append({**row, "ticket": rng.choice((None, "")), "gold": None})
        elif draw < SHARE_BAD + SHARE_DUPLICATES and rows:
            rows.append({**rng.choice(rows[-50:]), **row})  # sent twice, not long after
        else:
            ticket = make_ticket(rng)
            rows.append({**row, "ticket": ticket.text, "gold": ticket.gold})
    return rows
