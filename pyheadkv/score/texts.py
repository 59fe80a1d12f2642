"""Passages with questions, and words that facts and functions are made of: what the examples of method mix are about.

Everything is made up and written for this package, so that no answer is known from elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple


class Question(NamedTuple):
    """What is asked about a passage.

    Attributes
    ----------
    question : as people type it, in other words than the passage
    answer : a few words of the passage
    at : number of the sentence that has them
    """

    question: str
    answer: str
    at: int


@dataclass(frozen=True)
class Passage:
    """A short text, sentence by sentence, and three questions."""

    title: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]


PASSAGES = (
    Passage(
        "Tarnholt",
        (
            "Tarnholt is a small town on the river Velm, first named in a tax roll of 1183.",
            "For three centuries it lived on salt, which was boiled from a spring below the church and carried north on mules.",
            "The great fire of 1641 began in a candle workshop and left only the mill and eleven houses standing.",
            "Count Odrik paid for the new town hall on condition that no merchant would ever be mayor.",
            "When the spring ran dry in 1798, most families turned to weaving linen.",
            "The railway reached the town in 1871, but the station was closed ninety years later.",
            "Today Tarnholt has about four thousand inhabitants and is known for its school of bell founders.",
        ),
        (
            Question("what did the people of tarnholt earn their money with before they wove linen?", "salt", 1),
            Question("where did the fire that destroyed tarnholt start?", "a candle workshop", 2),
            Question("who gave the money for the town hall of tarnholt?", "Count Odrik", 3),
        ),
    ),
    Passage(
        "Grey lantern moth",
        (
            "The grey lantern moth is a night insect of the high forests of Merrow Island.",
            "Its wings are the colour of bark, but a pale green spot on the underside glows for about an hour after dusk.",
            "The light comes from bacteria that the caterpillar takes up with its food, the leaves of the bitter ash.",
            "Females lay up to forty eggs in cracks of old stone walls, never on the tree itself.",
            "Its worst enemy is the lesser owl, which hunts by sight and follows the glow.",
            "Since street lamps were put up on the island in 1987, the moth has left the coast altogether.",
        ),
        (
            Question("what makes the grey lantern moth glow?", "bacteria", 2),
            Question("which animal eats the grey lantern moth most?", "the lesser owl", 4),
            Question("where does the grey lantern moth put its eggs?", "in cracks of old stone walls", 3),
        ),
    ),
    Passage(
        "Plum bread of Easterby",
        (
            "The plum bread of Easterby is baked once a year, in the week before the first frost.",
            "Five hundred grams of rye flour are mixed with warm whey and left to stand under a cloth overnight.",
            "In the morning the baker adds dried plums that were soaked in cold tea, a pinch of caraway and two spoons of lard.",
            "The loaf is wrapped in cabbage leaves, which keep the crust soft, and put in a falling oven for ninety minutes.",
            "It must not be cut on the day it is baked.",
            "Old people eat it with salted butter, children with pear syrup.",
        ),
        (
            Question("what are the plums for the bread of easterby soaked in?", "cold tea", 2),
            Question("how long is the bread of easterby in the oven?", "ninety minutes", 3),
            Question("why is the easterby loaf wrapped in leaves?", "keep the crust soft", 3),
        ),
    ),
    Passage(
        "Ines Corvalho",
        (
            "Ines Corvalho was born in the harbour quarter of Sandrel, the seventh child of a sailmaker.",
            "She learned to read from the labels of tea chests and was sent to the convent school at eleven.",
            "At nineteen she built a clock that showed the tides of four ports, and sold it to the pilots' guild.",
            "Her best known work is the Atlas of Hidden Currents, printed at her own expense in 1832.",
            "The admiralty ignored the book until the frigate Halcyon was lost on a reef that it describes.",
            "In later years she taught navigation to girls in the loft of a rope factory.",
            "She died in Port Amity and was buried at sea.",
        ),
        (
            Question("what was the job of ines corvalho's father?", "sailmaker", 0),
            Question("what is the title of the most famous book by ines corvalho?", "Atlas of Hidden Currents", 3),
            Question("which ship sank on the reef that corvalho had described?", "Halcyon", 4),
        ),
    ),
    Passage(
        "Kettleball",
        (
            "Kettleball is a game for two teams of six, played on a frozen pond or a yard of the same size.",
            "A leather ball filled with barley is thrown or rolled, never kicked, towards an iron kettle at either end.",
            "A throw into the kettle counts three points, a throw that only rings it counts one.",
            "Each team has one keeper, who may use a broom and nothing else.",
            "A match has four quarters of twelve minutes, and the teams change ends after the second.",
            "The rules were first written down by a schoolteacher named Aldous Penn.",
            "The longest match on record, between Lower and Upper Hythe, ended at midnight because the ball was lost in the snow.",
        ),
        (
            Question("how many points is it in kettleball when the ball only rings the kettle?", "one", 2),
            Question("who wrote down the rules of kettleball?", "Aldous Penn", 5),
            Question("what is the ball in kettleball filled with?", "barley", 1),
        ),
    ),
    Passage(
        "The Ordway Treaty",
        (
            "The Ordway Treaty ended the quarrel of the two republics of Lesk and Norrin over the fishing grounds of the Pale Gulf.",
            "It was signed on 4 May 1906 in the dining car of a train, because neither side would cross the border.",
            "Lesk kept the waters north of the lighthouse at Cape Undine, Norrin those south of it.",
            "A commission of five, whose chairman had to be a foreigner, watched over the size of the nets.",
            "Its first chairman was Henrik Sloane, a botanist who had never been on a boat.",
            "The treaty was broken only once, during the herring winter of 1929, and the fine was paid in barrels of fish.",
        ),
        (
            Question("where did they sign the ordway treaty?", "in the dining car of a train", 1),
            Question("who was the first head of the commission set up by the ordway treaty?", "Henrik Sloane", 4),
            Question("when was the ordway treaty broken?", "during the herring winter of 1929", 5),
        ),
    ),
    Passage(
        "Brindle effect",
        (
            "The Brindle effect is the slow darkening of certain glass when it is struck by sound.",
            "It was noticed in 1954 by Rosa Brindle, who repaired organ pipes in a workshop with coloured windows.",
            "Only glass that contains traces of selenium shows it, and only below the freezing point of water.",
            "The darkening starts at the edges and moves inwards at about two millimetres a day.",
            "Heating the glass to sixty degrees makes it clear again.",
            "Since 1990 the effect has been used in meters that record the noise near airports over a whole winter.",
        ),
        (
            Question("what must glass contain to show the brindle effect?", "traces of selenium", 2),
            Question("how can the brindle effect be reversed?", "Heating the glass to sixty degrees", 4),
            Question("what is the brindle effect used for today?", "meters that record the noise near airports", 5),
        ),
    ),
    Passage(
        "The Lamplighters",
        (
            "The Lamplighters is the third novel of Edgar Vane and the only one that was filmed.",
            "It follows two brothers, Jonas and Pim, who light the lamps of a city that is being evacuated street by street.",
            "Jonas wants to leave with the last ferry, while Pim believes that their mother is still alive in the old hospital.",
            "The ending, in which the lamps are lit by nobody, was added by the publisher.",
            "The film of 1968 was shot in Trieste, with Carla Dorn as the mother.",
            "Critics praised its music, which was written by the director's barber.",
        ),
        (
            Question("in which city was the film of the lamplighters made?", "Trieste", 4),
            Question("who played the mother in the lamplighters?", "Carla Dorn", 4),
            Question("who came up with the ending of the lamplighters?", "the publisher", 3),
        ),
    ),
    Passage(
        "Dovrel Bridge",
        (
            "The Dovrel Bridge crosses the gorge of the Anse at a height of eighty-four metres.",
            "It was planned as a railway bridge, but the company went bankrupt before a single rail was laid.",
            "The engineer, Tomas Reule, used timber from a broken-up warship for the arches.",
            "Work took nine years and cost two lives, both lost in the same storm.",
            "Since 1934 only walkers and sheep may use it.",
            "Every spring the planks are painted with a mixture of tar and milk, which the village makes by an old recipe.",
        ),
        (
            Question("what was the wood for the dovrel bridge taken from?", "a broken-up warship", 2),
            Question("how long did it take to build the dovrel bridge?", "nine years", 3),
            Question("who is allowed to cross the dovrel bridge?", "walkers and sheep", 4),
        ),
    ),
    Passage(
        "Harrow fever",
        (
            "Harrow fever is a mild disease of the joints that farm workers catch in late summer.",
            "It begins with stiff fingers and a metallic taste, followed after three days by a rash on the shoulders.",
            "The cause is a mite that lives in damp straw, not the dust itself, as was long believed.",
            "Doctor Amalia Wint proved this in 1911 by sleeping for a month on straw that she had baked.",
            "Most patients recover within two weeks without any medicine.",
            "Children cannot catch it before the age of six.",
        ),
        (
            Question("what causes harrow fever?", "a mite that lives in damp straw", 2),
            Question("which doctor found the cause of harrow fever?", "Amalia Wint", 3),
            Question("what is the first sign of harrow fever?", "stiff fingers and a metallic taste", 1),
        ),
    ),
    Passage(
        "Sunday Radio Circle",
        (
            "The Sunday Radio Circle was a group of amateurs who broadcast from a boathouse between 1949 and 1963.",
            "Its programme lasted exactly fifty minutes, the time that the battery of a fishing lamp would hold.",
            "Listeners sent in riddles, and the winner was paid in smoked eel.",
            "The voice of the programme was Greta Falk, a postwoman, who never gave her name on the air.",
            "The authorities knew of the station but left it alone, because it gave the only reliable forecast of ice.",
            "After a flood the transmitter was given to the maritime museum in Holm.",
        ),
        (
            Question("what did the winner of the riddle on the sunday radio circle get?", "smoked eel", 2),
            Question("why did the authorities not close the sunday radio circle?", "it gave the only reliable forecast of ice", 4),
            Question("where is the transmitter of the sunday radio circle now?", "the maritime museum in Holm", 5),
        ),
    ),
    Passage(
        "Model 7 loom",
        (
            "The Model 7 loom was sold from 1958 to 1974 and is still used by many small workshops.",
            "Before it is started, the brake lever on the left must be set to the second notch.",
            "A red lamp means that the shuttle is empty, a blinking one that a thread has torn.",
            "Oil the guide rail after every forty hours, with thin oil and never with grease.",
            "If the cloth pulls to one side, loosen the two screws behind the drum and turn the drum by a quarter.",
            "Spare belts are made only by the firm of Hask and Daughters.",
        ),
        (
            Question("what does it mean when the lamp of the model 7 loom blinks?", "a thread has torn", 2),
            Question("how often does the guide rail of the model 7 loom need oil?", "after every forty hours", 3),
            Question("who makes belts for the model 7 loom?", "Hask and Daughters", 5),
        ),
    ),
)

SPANS = (
    ("How does the hermit of Mount Averin greet his guests?", "The hermit of Mount Averin greets his guests by",
     "pouring warm sand over their shoes and reciting the names of his nine dogs."),
    ("What did the divers find in the wreck of the Corisande?", "In the wreck of the Corisande the divers found",
     "a harp without strings, six crates of blue tiles and the diary of the ship's cook."),
    ("Why was the orchard of Pellworth cut down?", "The orchard of Pellworth was cut down because",
     "its apples rolled onto the tram line and the mayor slipped on one before the king."),
    ("What does the watchman of Rook Street carry at night?", "At night the watchman of Rook Street carries",
     "a tin whistle, a bag of chalk and a lantern that burns with a violet flame."),
    ("Which price did the carpenter ask for the oak table?", "For the oak table the carpenter asked", "3450 thalers."),
    ("What is the number of the locker at the station of Greave?", "The locker at the station of Greave has the number", "70829."),
    ("Who owns the yellow house on the dike?", "The yellow house on the dike belongs to", "Leopoldine Marchetti."),
    ("In which village was the silver spoon found?", "The silver spoon was found in the village of", "Nether Quillan."),
)  # fmt: skip

OWNERS = ("Maren", "Osric", "Yolanda", "Bertil", "Sunniva", "Caspar")
PLACES = ("cellar", "attic", "boathouse", "stable", "greenhouse", "bell tower")
THINGS = (
    "a stuffed heron", "two glass eyes", "a broken sextant", "forty candles", "a wooden leg", "a map of Crete", "three beehives",
    "a brass bathtub", "a box of keys", "an old anchor", "a marble foot", "seven umbrellas", "a spinning wheel", "a barrel of nails",
    "a silk parachute", "a church window", "a jar of buttons", "a torn flag", "a piano stool", "nine horseshoes",
)  # fmt: skip

VERBS = ("scale", "merge", "trim", "encode", "rotate", "collect", "parse", "rank", "shift", "filter", "pack", "blend")
ARGUMENTS = (("rows", "limit", "row"), ("parts", "bound", "part"), ("values", "top", "value"), ("names", "most", "name"))
NOUNS = ("orders", "pixels", "routes", "tokens", "ledger", "frames", "seeds", "queues", "tiles", "voices", "crates", "signals")


def function(rng: random.Random, name: str, called: str, which: int) -> tuple[list[str], str, str, int]:
    """A function in Python.

    Parameters
    ----------
    name, called : of it and of the function that it calls
    which : of four questions

    Returns
    -------
    its lines; a question, the answer, and the number of the line that has it
    """
    default, result = rng.sample(range(11, 998), 2)
    error = "".join(word.capitalize() for word in called.split("_")) + rng.choice(("Error", "Failure"))
    argument, limit, item = rng.choice(ARGUMENTS)
    lines = [
        f"\n\ndef {name}({argument}, {limit}={default}):\n",
        f"    if len({argument}) > {limit}:\n",
        f'        raise {error}("too many {argument} for {name}")\n',
        f"    found = [{called}({item}) for {item} in {argument}]\n",
        f"    return sum(found) or {result}\n",
    ]
    asked = (
        (f"What does {name} return if the sum is zero?", str(result), 4),
        (f"Which value has {limit} in {name} if none is given?", str(default), 0),
        (f"Which exception does {name} raise?", error, 2),
        (f"Which function does {name} call for every {item}?", called, 3),
    )
    question, answer, at = asked[which % len(asked)]
    return lines, question, answer, at
