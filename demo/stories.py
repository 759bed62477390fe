"""Simple English stories with something to follow: who has what, who can do what, what comes of it.

A plot draws its cast and returns a template in which `[this|that]` leaves a wording open. The
wordings are chosen last, independently of each other, so whatever two sentences must agree on is
drawn by the plot. Templates write `a` throughout and need no capitals: `_finish` sees to both.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


@dataclass(frozen=True)
class Animal:
    """Someone in a story; in a template it reads as its name."""

    name: str
    kind: str
    skill: str
    home: str
    they: str
    them: str
    their: str

    def __str__(self) -> str:
        return self.name


class Tale(NamedTuple):
    """What a plot tells: its hero, what happens, what is learnt, and how the hero is known."""

    hero: Animal
    events: str
    lesson: str
    trait: str = "[cheerful|curious|friendly|clever|gentle|lively|merry|quiet|kind|honest]"


def _table(text: str) -> list[tuple[str, ...]]:
    """A row for each line, its cells parted by semicolons."""
    return [tuple(cell.strip() for cell in line.split(";")) for line in text.strip().splitlines()]


ONSETS = """Ba Be Bi Bo Bri Da De Di Fe Fi Flo Ga Gi Ja Jo Ju Ka Ke Ki Klo La Le Li Lo Lu Ma Me Mi
    Mo Na Ne Ni No Pe Pi Po Ra Ri Ro Ru Sa Si So Sta Ta Te Ti To Tri Va Ve Vi Wi Za Zo""".split()
ENDINGS = {
    ("she", "her", "her"): ("la", "na", "ra", "lia", "nda"),
    ("he", "him", "his"): ("bo", "rin", "ko", "mus", "ric"),
}
COLOURS = "red blue green yellow orange purple white striped old little new".split()
TOYS = """kite ball drum hat whistle cup scarf boat bell basket flute spoon key mirror blanket
    umbrella ribbon coin book candle""".split()
FRUIT = "apple pear plum walnut acorn cherry carrot onion mushroom berry chestnut".split()
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

# kind; skill; home
KINDS = _table("""
    sparrow; fly; nest under the roof of the mill
    owl; fly; hollow oak
    crow; fly; old bell tower
    robin; fly; apple tree by the gate
    squirrel; climb; tall pine
    cat; climb; warm loft over the stable
    raccoon; climb; hollow log
    lizard; climb; crack in the garden wall
    otter; swim; den on the river bank
    frog; swim; clump of reeds
    duck; swim; nest among the rushes
    beaver; swim; lodge of sticks
    mole; dig; tunnel under the meadow
    rabbit; dig; burrow in the hill
    badger; dig; den among the roots
    armadillo; dig; hole beside the sandy path
    bear; push; cave in the hills
    ox; push; stone barn
    donkey; push; shed behind the inn
    boar; push; thicket at the edge of the wood
""")
SKILLS = ("fly", "climb", "swim", "dig", "push")
RESCUES = {
    "fly": "spread {their} wings and flew up",
    "climb": "climbed up [quickly|without fear]",
    "swim": "took a deep breath and dived down",
    "dig": "dug [and dug] until the earth flew",
    "push": "pushed [as hard as {they} could|with all {their} might]",
}
TRACES = {
    "fly": "there was a feather on the [floor|doorstep]",
    "climb": "there were scratches on the [wall|window frame]",
    "swim": "there were wet footprints [on the floor|all the way from the pond]",
    "dig": "there was a heap of fresh earth [in front of|beside] the door",
    "push": "the heavy door had been pushed [wide open|off its hinges]",
}
# morning; evening
SKIES = _table("""
    [One morning|One day] the sun [shone|was shining] on the [hills|fields].;\
        as the sun [went down|set] behind the hills,
    It had rained all [night|morning], and [every path was|the paths were] wet.;\
        while the rain [drummed on the leaves|began to fall] again,
    [One morning|One day] a [thick|white] fog lay over the [valley|fields].;\
        when the fog [came back|crept back] in the evening,
    [It was autumn|Autumn had come], and the leaves were [red and gold|turning yellow].;\
        while [yellow leaves|the leaves] fell outside,
    It was [the hottest day of the summer|a hot summer, and the grass was dry].;\
        in the cool of the evening,
""")
# one of these; said of it at the beginning; said of it at the end
ASIDES = _table("""
    sister|brother|mother|father|aunt|uncle|cousin; {their} {it} lived [next door|with {them}].;\
        {their} {it} [laughed|listened closely] when {they} told the story.
    pebble|shell|button|marble|pine cone|glass bead; in {their} bag was a lucky {it}.;\
        [at bedtime|that night] {they} put the {it} [beside|under] {their} pillow.
    porridge|pancakes|toast|rice|noodles|cheese; {they} [ate|had] {it} for breakfast.;\
        for supper {they} [ate|had] {it} again.
    yellow flowers|tall grass|blue thistles; around {their} home grew {it}.;\
        in the {it} the crickets [sang|chirped].
""")
# Where a thing comes to lie follows from how it was lost, and so do who can help and the lesson:
# how it was lost; where it lies; what does not help; who can; when to beware
LOSSES = _table("""
    a [sudden|strong] gust of wind [took it|carried it away];\
        at the top of the elm|on the roof of the school|on the highest cliff;\
        [jumped as high as {they} could|threw stones at it], but it was too high;\
        fly climb; when the wind blows
    it [slipped|rolled away] and fell into the water with a [loud |]splash;\
        at the bottom of the river|at the bottom of the pond|at the bottom of the lake;\
        [reached down from the bank|felt about with a stick], but the water was too deep;\
        swim; near the water
    it [rolled away|fell down] and [was gone|vanished];\
        deep in a crack in the ground|far down a narrow hole|deep under the roots;\
        [reached down into the dark|lay down and felt for it], but it was too far down;\
        dig; where there are holes in the ground
    there was a [loud|terrible] crash, and {they} [dropped it and ran|jumped aside];\
        under a fallen tree|under a heavy rock|under a overturned cart;\
        pulled with all {their} strength, but [nothing moved|it was stuck];\
        push; where heavy things may fall
""")
# ware; how it comes; where from
GOODS = _table("""
    bread; a loaf of; the bakery
    honey; a jar of; the beehives
    milk; a jug of; the dairy
    flour; a sack of; the mill
    water; a bucket of; the well
    wool; a ball of; the weaver
    salt; a bag of; the harbour
    straw; a bundle of; the farm
""")
# verb; past; object
CHORES = _table("""
    sweep; swept; the yard
    carry; carried; the firewood
    pick; picked; the beans
    mend; mended; the fence
    wash; washed; the windows
    feed; fed; the hens
    paint; painted; the door
    dig; dug; the garden
""")
# why a present is needed; the present; what it is made of; what it changes
GIFTS = _table("""
    was always cold; scarf; wool; was warm even on the coldest days
    hummed songs all day; flute; cane; played a new tune every morning
    was afraid of the dark; lantern; glass; was not afraid at night any more
    slept badly on {their} hard bed; pillow; down; slept well every night
    always got wet in the rain; umbrella; oilcloth; stayed dry in every storm
    kept losing {their} pencils; pencil box; oak wood; never lost a pencil again
    dreamed of the sea; toy boat; bark; sailed it on the pond and talked of the sea
    told wonderful stories; book; paper; wrote a story in it every evening
    was often late in the morning; clock; brass; was never late again
    had nothing to carry apples in; basket; willow; carried apples home by the dozen
""")
# thing; its accident; its state; how two mend it
BREAKS = _table("""
    kite; flew into a thorn bush; torn; sewed it up with strong thread
    cup; fell on the stone floor; cracked; closed the crack with glue
    drum; was struck too hard; split; stretched a new skin over it
    lantern; fell from its hook; broken; put in a new pane of glass
    necklace; caught on a nail; in pieces; threaded the beads on a new string
    basket; was trodden on by a cow; flat; pulled it straight and wove in new willow
    boat; ran against a stone; leaky; closed the hole with tar
    cloak; came too near the fire; burnt; cut off the edge and hemmed it again
""")
# deed; what it leads to; what helps
ILLS = _table("""
    fell into the cold brook; had a bad cough; hot soup
    ate too many plums; had a stomach ache; mint tea
    sang at the top of {their} voice; could only whisper; thick honey
    walked through the thorns; could hardly walk; a sharp needle
    slept in the draught; had a stiff neck; a warm cloth
    ran into a tree; had a bump on the head; a lump of ice
    read by the light of one candle; had [red|sore] eyes; cool drops
""")


def story(seed: int) -> str:
    """One story of about 120 to 240 words, the same for the same seed."""
    rng = Random(seed)
    return _finish(_choose(rng, _frame(rng, rng.choice(PLOTS)(rng))))


def _choose(rng: Random, template: str) -> str:
    while "[" in template:  # the innermost brackets first
        template = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return template


def _finish(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)
    # A quotation that ends in ? or ! may go on as `said Mila`: what follows it is left alone.
    return re.sub(r'(?:^|[.!?] |\." |, ")"?[a-z]', lambda m: m[0].upper(), text)


def _cast(rng: Random, *skills: Collection[str]) -> list[Animal]:
    """An animal for each set of skills, no two of one kind or with names that begin alike."""
    animals, kinds = [], list(KINDS)
    for onset, able in zip(rng.sample(ONSETS, len(skills)), skills, strict=True):
        row = rng.choice([row for row in kinds if row[1] in able])
        kinds.remove(row)
        pronouns = rng.choice(list(ENDINGS))
        animals.append(Animal(onset + rng.choice(ENDINGS[pronouns]), *row, *pronouns))
    return animals


def _fill(phrase: str, who: Animal, **more: str) -> str:
    return phrase.format(they=who.they, them=who.them, their=who.their, **more)


def _toys(rng: Random, n: int) -> list[str]:
    pairs = zip(rng.sample(COLOURS, n), rng.sample(TOYS, n), strict=True)
    return [f"{colour} {toy}" for colour, toy in pairs]


def _count(n: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{NUMBERS[n]} {noun if n == 1 else plural}"


def _frame(rng: Random, tale: Tale) -> str:
    h, (morning, evening), (things, before, after) = tale.hero, *map(rng.choice, (SKIES, ASIDES))
    it = rng.choice(things.split("|"))
    return f"""
    [[Once|Long ago|Once upon a time] there was a {tale.trait} {h.kind} [called|named] {h}, who
        lived in a {h.home}.
    |In a {h.home} [there lived|lived] a {tale.trait} {h.kind} [called|named] {h}.
    |{h} was a {tale.trait} {h.kind} [who lived|and lived] in a {h.home}.
    |{h} the {h.kind} lived in a {h.home}. [Everyone|Everybody] knew how {tale.trait} {h.they} was.]
    {_fill(before, h, it=it)} {morning}
    {tale.events}
    [{evening} {h} [rested|fell asleep|sat happily] in {h.their} {h.home}.|]
    {_fill(after, h, it=it)}
    [{h} [had learned|never forgot]|[From then on|From that day on] {h} knew] that {tale.lesson}.
    """


def lost(rng: Random) -> Tale:
    cause, spots, attempt, able, danger = rng.choice(LOSSES)
    unable = [skill for skill in SKILLS if skill not in able.split()]
    h, x, f = _cast(rng, unable, unable, able.split())
    toy, spot = *_toys(rng, 1), rng.choice(spots.split("|"))
    events = f"""
    {h} had a {toy}[, a present from {h.their} [mother|father|aunt]|, and {h.they} loved it
    [dearly|very much]]. {h.they} was [playing|walking along] with it when {_fill(cause, h)}.
    Now the {toy} was {spot}. {h} {_fill(attempt, h)}.
    [{h.they} sat down and cried.|{h.they} was close to tears.]
    [[{x} the {x.kind} came by.|Along came {x} the {x.kind}.] "I can only {x.skill}," said {x}.
    "[That is no use here|That does not help you]."|]
    Then [came {f} the {f.kind}|{f} the {f.kind} [came|passed by]].
    "[What is the matter|Why are you so sad], {h}?" asked {f}. "My {toy} is {spot}," [said|sobbed]
    {h}. "[That is easy|Do not cry|I can help you]," said {f}. "I can {f.skill}!" {f}
    {_fill(RESCUES[f.skill], f)}, and soon {f.they} [came back|returned] with the {toy}.
    {h} [thanked|hugged] {f.them} [with all {h.their} heart|again and again].
    """
    lesson = f"[it is wise to be careful|one must take care] {danger}"
    return Tale(h, events, f"{lesson}[, and that a {f.kind} makes a good friend|]")


def swap(rng: Random) -> Tale:
    h, x, y = _cast(rng, SKILLS, SKILLS, SKILLS)
    mine, asked, wanted = _toys(rng, 3)
    owners = [f"{h} had the {wanted}", f"{x} had the {asked}", f"{y} had the {mine}"]
    rng.shuffle(owners)
    events = f"""
    {h} had a {mine}, but {h.they} was [tired of|bored with] it.
    [At the market|On the bridge|At the crossroads|By the sea] {h.they} met {x} the {x.kind}, who
    had a {wanted}. "[How pretty it is|What a fine thing]!" said {h}. "Will you [swap|trade] it for
    my {mine}?" "[No|No, thank you]," said {x}. "[I have no use for it|I do not need one]. But I
    will give you my {wanted} for a {asked}." So {h} went [looking|to look] for a {asked}.
    [Behind the mill|Near the well|In the next village|At the harbour] {h.they} [found|met] {y} the
    {y.kind}, who had [one|just that]. "[Please|Dear {y}], will you give me your {asked}?"
    [asked|begged] {h}. "You can have my {mine} for it." {y} [agreed at once|was glad to
    agree|thought about it and nodded]. So {y} got the {mine}, and {h} [hurried|ran] back to {x}
    with the {asked}.
    "[Here it is|Look what I have]," said {h}, and {x} gave {h.them} the {wanted}.
    In the end {owners[0]}, {owners[1]} and {owners[2]}, and all three were [happy|content].
    """
    return Tale(h, events, "[patience|a good swap] can make [three friends|everyone] happy")


def errand(rng: Random) -> Tale:
    h, old, x = _cast(rng, SKILLS, SKILLS, SKILLS)
    wares = rng.sample(GOODS, 3)
    a, b, c = (f"{measure} {ware}" for ware, measure, _ in wares)
    (ware1, measure1, place1), (ware2, measure2, place2), (ware3, _, place3) = rng.sample(wares, 3)
    why, because = rng.choice(
        (
            (f"{x} the {x.kind} [called out to|stopped] {h.them}", f"talked to {x}"),
            ("a band [was playing|played] in the square", "listened to the music"),
            ("a [big|blue] butterfly flew by", "ran after a butterfly"),
            ("the clouds looked like [ships|sheep]", "looked at the clouds"),
        )
    )
    events = f"""
    [Across the road|Not far away] lived {old}, a old {old.kind}. "[Please|Dear {h}, please] bring
    me {a}, {b} and {c}," said {old}. "[Of course|I will]!" said {h}, and off {h.they} went.
    First {h.they} went to {place1} for the {ware1}. Then {h.they} went to {place2} for the {ware2}.
    On the way {why}, and {h} forgot [everything else|the rest]. [Whistling|In high spirits],
    {h.they} came back to {old}. {old} looked into the bag. "Here is {measure1} {ware1}, and here is
    {measure2} {ware2}," {old.they} said. "But what about the {ware3}?" {h} [turned red|hung
    {h.their} head]. "I forgot it," {h.they} said. "I {because}." "[Never mind|That can happen],"
    said {old}. So {h} went out again, this time to {place3}, and [soon|before long] {old} had the
    {ware3} too. {old} [gave {h.them} a cake|told {h.them} a story] as a reward.
    """
    return Tale(h, events, "[listening once saves walking twice|haste makes one forgetful]")


def gift(rng: Random) -> Tale:
    h, f, x = _cast(rng, SKILLS, SKILLS, SKILLS)
    wish, present, material, change = (_fill(cell, f) for cell in rng.choice(GIFTS))
    verb, past, chore = rng.choice(CHORES)
    events = f"""
    {h} had a friend, {f} the {f.kind}, whose birthday was [the next day|on Sunday|two days away].
    "What [can|shall] I give {f.them}?" {h} wondered. Then {h.they} remembered that {f} {wish}.
    "[I know|I have it]!" cried {h}. "I will make {f.them} a {present}." For that {h.they} needed
    {material}, and {x} the {x.kind} had [some|plenty of it].
    "[First|Please] {verb} {chore} for me," said {x}. "Then [you may have|I will give you] the
    {material}." So {h} {past} {chore}, took the {material} home and worked until [midnight|late at
    night]. On {f.their} birthday {f} opened the [parcel|box]. "A {present}!" cried {f}.
    "[It is just what I need!|Did you make it for me?]" {f} [hugged|thanked] {h}, and after that
    {f.they} {change}.
    """
    return Tale(h, events, "[the best present is one that is needed|a good friend remembers]")


def broken(rng: Random) -> Tale:
    h, f = _cast(rng, SKILLS, SKILLS)
    thing, accident, state, mended = rng.choice(BREAKS)
    if rng.random() < 0.5:
        trait, lesson = "honest", "[the truth is best told at once|honest words mend much]"
        confession = f"""
        {h} [could have hidden it|was afraid], but {h.they} went [straight|at once] to {f}.
        "[I have bad news|Do not be angry], {f}," {h.they} said. "Your {thing} {accident}, and now
        it is {state}." """
    else:
        trait, lesson = "shy", f"a lie [weighs more|is worse] than a {thing} that is {state}"
        place = rng.choice(("under the bed", "behind the stove", "inside a hollow tree"))
        confession = f"""
        {h} hid the {thing} {place} and told nobody. The next day {f} asked, "Where is my {thing}?"
        "[I do not know|I have not seen it]," said {h}, but {h.they} could not sleep that night.
        In the morning {h} took the {thing} from {place} and [carried|brought] it to {f}.
        "It {accident}," {h.they} [said|whispered]. "I [hid it|lied to you]. Now it is {state}." """
    events = f"""
    {h}'s [friend|neighbour] {f} the {f.kind} had a {rng.choice(COLOURS)} {thing}, and {h} asked to
    borrow it. "[Gladly|Of course]," said {f}. "But [be careful|take care]." {h} promised it. [All
    went well for a while.|At first {h.they} was very careful.] Then the {thing} {accident}, and
    there it was, {state}. {confession} {f} [was silent|frowned] for a moment, but then {f.they}
    smiled. "[Thank you for telling me|I am glad that you told me], {h}," said {f}. "[Let us|We can]
    mend it together." They {mended}, and soon the {thing} was [as good as new|better than before].
    """
    return Tale(h, events, lesson, trait)


def sharing(rng: Random) -> Tale:
    h, x, y = _cast(rng, SKILLS, SKILLS, SKILLS)
    fruit, n = rng.choice(FRUIT), rng.randint(5, 12)
    a = rng.randint(1, n - 3)
    b = rng.randint(1, n - a - 1)
    left = n - a - b
    dish, drink = rng.sample(("a pie", "hot soup", "fresh bread", "warm milk", "sweet tea"), 2)
    if rng.random() < 0.5:
        trait, lesson = "generous", "[what one gives comes back|kindness comes back]"
        outcome = f"""
        "[Take|Have] {_count(a, fruit)}," said {h}. {x} [thanked {h.them}|smiled], and {h} had
        {_count(n - a, fruit)} left. Near the [mill|bridge] sat {y} the {y.kind}, who had eaten
        nothing [all day|since morning]. {h} gave {y.them} {_count(b, fruit)}, and so there
        {"was" if left == 1 else "were"} only {_count(left, fruit)} for {h.them}. [The next week|A
        week later] {h} was ill in bed. {x} remembered the {_count(a, fruit)} and came with {dish}.
        {y} remembered the {_count(b, fruit)} and came with {drink}."""
    else:
        trait, lesson = "greedy", "[who keeps everything may lose everything|it is good to share]"
        outcome = f"""
        "[May I have|Will you give me] one?" asked {x}. "No," said {h}. "All {NUMBERS[n]} are mine."
        Near the bridge {y} the {y.kind} asked too. "No," said {h} again, and walked [on|faster].
        But {h.their} bag was too [full|heavy]. It tore, and all {_count(n, fruit)} [rolled|fell]
        into the river. {h} had nothing left and [cried|sat down by the road]. Then {x} came with
        {dish} and {y} with {drink}. "[Eat with us|Here is enough for three]," they said, and {h}
        was ashamed."""
    events = f"""
    {h} [had gathered|had found] {_count(n, fruit)} and was [carrying them home|on {h.their} way
    home]. On the [road|path] {h.they} met {x} the {x.kind}, who [looked hungry|was hungry].
    {outcome}
    """
    return Tale(h, events, lesson, trait)


def ill(rng: Random) -> Tale:
    h, x, y = _cast(rng, SKILLS, SKILLS, SKILLS)
    (cause, effect, cure), (cause2, effect2, cure2) = rng.sample(ILLS, 2)
    events = f"""
    That day {h} {_fill(cause, h)}, and the next morning {h.they} {effect}.
    {x} the {x.kind}, who was the doctor, came [at once|with a big bag]. "What did you do
    yesterday?" asked {x}. "I {cause.format(their="my")}," [said|answered] {h}. "Then you need
    {cure}," said {x}. {h} had [no such thing|nothing like that], but {h.their} neighbour {y} the
    {y.kind} had {cure} [in the house|at home] and brought it over. {y} [stayed and told
    stories|sat by the bed until evening]. After [two|three] days {h} was well again.
    A [week|month] later {y} {_fill(cause2, y)}, and of course {y.they} {effect2}.
    "I know what you need," said {h}, and {h.they} [came|ran over] with {cure2}.
    "[Thank you, doctor|You are a good doctor]!" said {y}, and both laughed.
    """
    return Tale(h, events, "[good neighbours help each other|one good turn deserves another]")


def mystery(rng: Random) -> Tale:
    h, x, y, z = _cast(rng, SKILLS, *([skill] for skill in rng.sample(SKILLS, 3)))
    thief, other, another = rng.sample((x, y, z), 3)
    (toy,) = _toys(rng, 1)
    events = f"""
    {h} looked for {h.their} {toy}, but it was gone, and {TRACES[thief.skill]}. "[Who has
    it|Who was here]?" {h} [wondered|asked]. Three neighbours had come by the day before: {x} the
    {x.kind}, {y} the {y.kind} and {z} the {z.kind}. {h} thought [hard|for a long time].
    "{other} cannot {thief.skill}, and {another} cannot {thief.skill}," {h.they} said. "It must have
    been {thief}." {h} went to {thief}'s {thief.home}, and [there|sure enough, there] sat {thief}
    with the {toy}. "[I am sorry|Forgive me]," said {thief}. "I only wanted to [show it to my
    mother|play with it once|see how it was made]." "[Next time, just ask|You could have asked],"
    said {h}. {thief} gave the {toy} back, and {h} [invited {thief.them} to tea|let {thief.them}
    hold it once more].
    """
    return Tale(h, events, "[asking is better than taking|it pays to look closely]")


PLOTS = (lost, swap, errand, gift, broken, sharing, ill, mystery)
