"""The ten small skills of the embedded task: what the base model has read, and what it is asked.

A skill is a list of facts and three families of wordings. *Statements* and *reports* are what the base
model is pre-trained on; *questions* are what instructions ask. Questions occur in the pre-training text
only inside reported speech, never in the frame of an instruction: fine-tuning then has to elicit what the
base already knows, as it does with a real pre-trained model, and which rows are chosen decides how far it
gets. With statements alone it would have to teach, and more data would always win.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CODED_SKILLS", "REPORTS", "SKILLS", "Fact", "Skill"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: the words that fill a wording's blanks, and the answer."""

    words: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Skill:
    """A family of facts with the wordings that state and ask them.

    In every wording ``{0}``, ``{1}`` stand for the fact's words and ``{y}`` for its answer.
    """

    name: str
    facts: tuple[Fact, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def ask(self, fact: Fact, wording: int) -> str:
        """Return the question about `fact` in the given wording."""
        return self.questions[wording].format(*fact.words)

    def state(self, fact: Fact, wording: int) -> str:
        """Return the plain statement of `fact` in the given wording."""
        return self.statements[wording].format(*fact.words, y=fact.answer)


#: Reported dialogue: ``{q}`` is a question of some skill, ``{y}`` its answer.
REPORTS = (
    'Asked "{q}" she said {y}.',
    'Asked "{q}" he answered {y}.',
    '"{q}" asked Tom. "{y}," said Ann.',
    'Ann heard "{q}" and wrote {y}.',
    'When they asked "{q}" the old man said "{y}".',
    'To "{q}" the reply was {y}.',
)

_NOUNS = """ant apple arm bag ball bank bath bed bell bird boat book bottle bow box boy branch bread bridge brick
brush bus bush button cake candle car card cat chain chair church city class clock cloud coat coin cook cow cross
cup day desk dish doctor dog door dress duck eagle ear egg eye farm finger fire fish flag floor flower fly fork
fox frog garden gate girl glass goat hand hat hen hill horse house island jar key king kite lady lake lamp leaf
letter lion map mouth nail nest nose orange park party peach pen pencil pig plant plate pocket pond potato puppy
queen ring river road rock roof room rope school sea seed ship shoe shop snake song spoon star step stone story
street table tail tent tiger tomato tooth town toy train tree truck uncle vase wall watch wave window wing wish
witch wolf word""".split()

_IRREGULAR_PLURALS = {"leaf": "leaves", "wolf": "wolves", "tooth": "teeth"}

_VERBS = """act:acted add:added ask:asked bake:baked begin:began bite:bit blow:blew boil:boiled break:broke
bring:brought brush:brushed build:built burn:burned buy:bought call:called carry:carried catch:caught chase:chased
clap:clapped clean:cleaned climb:climbed close:closed come:came cook:cooked count:counted cry:cried dance:danced
dig:dug draw:drew dream:dreamed drink:drank drive:drove drop:dropped dry:dried eat:ate fall:fell feed:fed feel:felt
fight:fought fill:filled find:found fix:fixed float:floated fly:flew fold:folded forget:forgot freeze:froze
get:got give:gave go:went grow:grew guess:guessed hang:hung hear:heard help:helped hide:hid hold:held hope:hoped
hug:hugged hunt:hunted jump:jumped keep:kept kick:kicked knock:knocked know:knew laugh:laughed lead:led learn:learned
leave:left lift:lifted like:liked listen:listened live:lived look:looked lose:lost love:loved make:made march:marched
meet:met melt:melted mix:mixed move:moved nod:nodded open:opened paint:painted pass:passed pay:paid pick:picked
plan:planned plant:planted play:played pour:poured pray:prayed pull:pulled push:pushed race:raced rain:rained
reach:reached rest:rested ride:rode ring:rang run:ran sail:sailed save:saved say:said see:saw sell:sold send:sent
shake:shook share:shared shine:shone shout:shouted show:showed sing:sang sink:sank sit:sat skip:skipped sleep:slept
smell:smelled smile:smiled speak:spoke spend:spent stand:stood start:started stay:stayed steal:stole stop:stopped
study:studied swim:swam swing:swung take:took talk:talked teach:taught tell:told thank:thanked think:thought
throw:threw touch:touched try:tried turn:turned visit:visited wait:waited wake:woke walk:walked want:wanted
wash:washed watch:watched wave:waved wear:wore win:won wish:wished work:worked write:wrote yell:yelled""".split()

_OPPOSITES = """hot:cold big:small tall:short fast:slow young:old hard:soft wet:dry full:empty light:dark rich:poor
early:late good:bad happy:sad high:low loud:quiet near:far open:shut clean:dirty thick:thin wide:narrow strong:weak
deep:shallow first:last right:wrong sharp:blunt smooth:rough sweet:sour true:false up:down in:out day:night
north:south east:west black:white love:hate win:lose give:take buy:sell push:pull stop:go above:below before:after
always:never all:none asleep:awake brave:afraid cheap:costly easy:difficult inside:outside
kind:cruel left:right less:more lost:found new:used over:under polite:rude safe:dangerous same:different
simple:complex start:finish top:bottom warm:cool wise:foolish yes:no""".split()

_CAPITALS = """France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna Greece:Athens Poland:Warsaw
Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin England:London Scotland:Edinburgh
Wales:Cardiff Portugal:Lisbon Belgium:Brussels Hungary:Budapest Russia:Moscow Ukraine:Kyiv Turkey:Ankara Egypt:Cairo
Kenya:Nairobi Ghana:Accra Nigeria:Abuja Morocco:Rabat Algeria:Algiers Tunisia:Tunis Libya:Tripoli Sudan:Khartoum
Ethiopia:Addis China:Beijing Japan:Tokyo Korea:Seoul Thailand:Bangkok Vietnam:Hanoi India:Delhi Nepal:Kathmandu
Iran:Tehran Iraq:Baghdad Syria:Damascus Lebanon:Beirut Jordan:Amman Canada:Ottawa Mexico:Mexico Cuba:Havana
Peru:Lima Chile:Santiago Brazil:Brasilia Colombia:Bogota Ecuador:Quito Bolivia:Sucre Uruguay:Montevideo
Australia:Canberra Iceland:Reykjavik Serbia:Belgrade Croatia:Zagreb Romania:Bucharest Bulgaria:Sofia""".split()

_COLOURS = """grass:green snow:white coal:black blood:red milk:white lemon:yellow banana:yellow cherry:red
carrot:orange chocolate:brown leaf:green night:black sky:blue sea:blue sun:yellow rose:red violet:purple plum:purple
grape:purple pea:green cucumber:green lettuce:green frog:green ash:grey elephant:grey mouse:grey cloud:white
salt:white sugar:white rice:white flour:white butter:yellow corn:yellow honey:yellow gold:yellow sand:yellow
tomato:red strawberry:red ruby:red brick:red flame:red flamingo:pink pig:pink salmon:pink peach:orange pumpkin:orange
tiger:orange fox:orange wood:brown soil:brown bear:brown coffee:brown raven:black tar:black ink:black panther:black
swan:white chalk:white emerald:green sapphire:blue""".split()

_KINDS = {
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey camel deer donkey",
    "bird": "eagle sparrow robin crow owl swan gull parrot hawk pigeon stork finch raven heron wren thrush",
    "fruit": "apple pear plum grape banana cherry lemon mango peach melon orange fig apricot kiwi",
    "tool": "hammer saw drill axe spade rake pliers chisel file wrench screwdriver shovel",
    "colour": "red green blue yellow purple brown pink grey white black",
    "metal": "iron gold silver copper tin lead zinc nickel steel bronze",
    "tree": "oak pine elm birch maple willow cedar ash beech fir",
    "drink": "milk tea coffee juice water wine beer cocoa lemonade cider",
    "game": "chess tennis football poker golf hockey cricket rugby darts bowls",
    "cloth": "shirt coat sock glove scarf hat skirt dress jacket belt",
}


def _pairs(text: list[str]) -> tuple[Fact, ...]:
    split = (entry.split(":") for entry in text)
    return tuple(Fact((word,), answer) for word, answer in split)


def _plural(noun: str) -> str:
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh", "ato")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _larger_pairs() -> tuple[Fact, ...]:
    # Every seventh pair of two-digit numbers: spread evenly, in a fixed order, and few enough to be learned.
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b][::7]
    return tuple(Fact((str(a), str(b)), str(max(a, b))) for a, b in pairs)


def _opposites() -> tuple[Fact, ...]:
    # A word may stand in one pair only in each direction: "right" is the opposite of "wrong" and of "left".
    opposite: dict[str, str] = {}
    for entry in _OPPOSITES:
        first, second = entry.split(":")
        opposite.setdefault(first, second)
        opposite.setdefault(second, first)
    return tuple(Fact((word,), answer) for word, answer in opposite.items())


SKILLS: tuple[Skill, ...] = (
    Skill(
        "plural",
        tuple(Fact((noun,), _plural(noun)) for noun in _NOUNS),
        ("one {0}, two {y}.", "many a {0} makes {y}.", "a {0} here, and more {y} there."),
        ("What is the plural of {0}?", "One {0}, two what?", "Write {0} in the plural.", "More than one {0}?"),
    ),
    Skill(
        "past",
        _pairs(_VERBS),
        ("today they {0}, yesterday they {y}.", "they {0} now as they {y} before.", "to {0} is what they {y}."),
        ("What is the past of {0}?", "Today they {0}; yesterday?", "Write {0} in the past.", "Past tense of {0}?"),
    ),
    Skill(
        "add",
        tuple(Fact((str(a), str(b)), str(a + b)) for a in range(2, 31) for b in range(1, 10)),
        ("{0} plus {1} is {y}.", "{0} and {1} make {y}.", "add {1} to {0} and get {y}."),
        ("What is {0} plus {1}?", "Add {1} to {0}.", "{0} and {1} make?", "Sum of {0} and {1}?"),
    ),
    Skill(
        "larger",
        _larger_pairs(),
        ("of {0} and {1} the larger is {y}.", "between {0} and {1}, {y} is more.", "{0} or {1}: {y} is bigger."),
        ("Which is larger, {0} or {1}?", "Larger of {0} and {1}?", "Name the bigger: {0} or {1}.", "{0} or {1}: more?"),
    ),
    Skill(
        "next",
        tuple(Fact((str(n),), str(n + 1)) for n in range(10, 999, 2)),
        ("after {0} comes {y}.", "{0} is followed by {y}.", "count on from {0}: {y}."),
        ("What comes after {0}?", "Next number after {0}?", "Count one on from {0}.", "{0}, and then?"),
    ),
    Skill(
        "opposite",
        _opposites(),
        ("the opposite of {0} is {y}.", "not {0} but {y}.", "{0} and {y} are opposites."),
        ("What is the opposite of {0}?", "Not {0} but what?", "Give the opposite of {0}.", "Opposite of {0}?"),
    ),
    Skill(
        "capital",
        _pairs(_CAPITALS),
        ("the capital of {0} is {y}.", "{y} is where {0} is ruled from.", "in {0} the capital is {y}."),
        ("What is the capital of {0}?", "Capital of {0}?", "Name the capital of {0}.", "From where is {0} ruled?"),
    ),
    Skill(
        "letter",
        tuple(Fact((noun,), noun[0]) for noun in _NOUNS),
        ("{0} begins with {y}.", "the first letter of {0} is {y}.", "{y} is how {0} starts."),
        ("What does {0} begin with?", "First letter of {0}?", "Give the first letter of {0}.", "How does {0} start?"),
    ),
    Skill(
        "colour",
        _pairs(_COLOURS),
        ("the colour of {0} is {y}.", "{0} is {y}.", "as {y} as {0}."),
        ("What colour is {0}?", "Colour of {0}?", "Name the colour of {0}.", "{0} looks?"),
    ),
    Skill(
        "kind",
        tuple(Fact((word,), kind) for kind, words in _KINDS.items() for word in words.split()),
        ("{0} is a kind of {y}.", "every {0} is a {y}.", "a {y} such as {0}."),
        ("What kind of thing is {0}?", "{0} is a kind of?", "Name the kind of {0}.", "What is {0}?"),
    ),
)

#: Made-up words that ask for a skill: the base model knows the facts, and has never read the question.
_CODES = {"plural": "zib", "past": "mof", "add": "ket", "larger": "dag"}


def _coded(skill: Skill) -> Skill:
    if skill.name not in _CODES:
        return skill
    code, blanks = _CODES[skill.name], " ".join(f"{{{place}}}" for place in range(len(skill.facts[0].words)))
    return replace(skill, questions=(f"{code} {blanks}", f"{blanks} {code}", f"{code}: {blanks}", f"{blanks}, {code}"))


#: The same skills, four of them asked for by a code that has to be learned.
CODED_SKILLS = tuple(_coded(skill) for skill in SKILLS)
