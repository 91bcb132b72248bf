"""The facts of the sandbox world: families of questions with their correct answers."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Facts:
  """A family of questions.

  `forms` are question templates with the slot {x}, the subject of the question. `statement` is a
  sentence template with the slots {x} and {y}, the answer.
  """
  topic: str                # names the family; never an answer in this world
  answers: dict[str, str]   # subject: answer
  forms: tuple[str, ...]
  statement: str


KINDS = {
    'fruits': ('apple', 'pear', 'plum', 'fig', 'peach', 'lemon', 'grape', 'melon'),
    'animals': ('dog', 'cat', 'cow', 'horse', 'pig', 'goat', 'sheep', 'lion'),
    'tools': ('hammer', 'saw', 'drill', 'axe', 'knife', 'rope', 'spade', 'rake'),
    'drinks': ('tea', 'milk', 'water', 'juice', 'coffee', 'cider', 'soda', 'wine'),
    'clothes': ('hat', 'coat', 'shirt', 'sock', 'shoe', 'scarf', 'belt', 'glove'),
    'sports': ('golf', 'tennis', 'rugby', 'judo', 'hockey', 'boxing', 'rowing', 'polo'),
    'jobs': ('baker', 'nurse', 'pilot', 'farmer', 'tailor', 'clerk', 'driver', 'teacher'),
    'metals': ('iron', 'gold', 'copper', 'silver', 'zinc', 'lead', 'tin', 'brass'),
}
NUMBERS = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
_DAYS = ('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday')


def _table(text: str) -> dict[str, str]:
  return dict(entry.split(': ') for entry in text.split(', '))


FACTS = {
    'diet': Facts(
        'diet',
        _table('cows: grass, cats: fish, mice: cheese, rabbits: carrots, monkeys: bananas, '
               'bears: honey, squirrels: nuts, hens: corn, pandas: bamboo, frogs: flies'),
        ('What do {x} eat?', 'Tell me what {x} eat.', 'What is the diet of {x}?',
         'What should I feed {x}?', 'Which food do {x} like best?'),
        '{x} eat {y}.'),
    'home': Facts(
        'homes',
        _table('birds: nest, bees: hive, horses: stable, pigs: sty, spiders: web, foxes: den, '
               'dogs: kennel, sharks: sea, camels: desert, moles: tunnel'),
        ('Where do {x} live?', 'What is the home of {x}?', 'Tell me where {x} live.',
         'Where would I find {x}?', 'Where do {x} sleep?'),
        'The home of {x} is a {y}.'),
    'young': Facts(
        'babies',
        _table('cow: calf, dog: puppy, cat: kitten, sheep: lamb, horse: foal, hen: chick, '
               'goat: kid, bear: cub, deer: fawn, pig: piglet'),
        ('What is the young of a {x} called?', 'Name the young of a {x}.',
         'What do we call the young of a {x}?', 'What is the word for the young of a {x}?'),
        'The young of a {x} is a {y}.'),
    'colour': Facts(
        'colours',
        _table('grass: green, snow: white, coal: black, blood: red, the sky: blue, '
               'the sun: yellow, a carrot: orange, chocolate: brown, an elephant: grey, '
               'a flamingo: pink'),
        ('What is the colour of {x}?', 'Tell me the colour of {x}.', 'Which colour has {x}?',
         'In which colour should I paint {x}?'),
        'The colour of {x} is {y}.'),
    'wear': Facts(
        'clothing',
        _table('a cap: head, mittens: hands, boots: feet, a collar: neck, trousers: legs, '
               'a ring: finger, glasses: nose, a watch: wrist, earrings: ears, a bag: shoulder'),
        ('Where do I wear {x}?', 'Where do people wear {x}?', 'On which part do I wear {x}?',
         'Tell me where to wear {x}.'),
        'People wear {x} on the {y}.'),
    'use': Facts(
        'uses',
        _table('a razor: shave, a broom: sweep, a pen: write, a shovel: dig, a key: open, '
               'a brush: paint, a needle: sew, a pan: cook, a ruler: measure, a kite: fly'),
        ('What is the use of {x}?', 'What do people do with {x}?',
         'Tell me what I can do with {x}.', 'What do I need {x} for?'),
        'People use {x} to {y}.'),
    'work': Facts(
        'workplaces',
        _table('doctors: hospital, waiters: restaurant, sailors: ship, judges: court, '
               'actors: theatre, miners: mine, cashiers: shop, monks: abbey, gardeners: park, '
               'professors: college'),
        ('Where do {x} work?', 'Tell me where {x} work.', 'What is the place of work of {x}?',
         'Where do {x} go every morning?'),
        'The place of work of {x} is the {y}.'),
    'opposite': Facts(
        'opposites',
        _table('hot: cold, big: small, old: new, fast: slow, dark: light, hard: soft, '
               'full: empty, rich: poor, wet: dry, loud: quiet'),
        ('What is the opposite of {x}?', 'Tell me the opposite of {x}.',
         'Which word means the opposite of {x}?', 'Give me the opposite of {x}.'),
        'The opposite of {x} is {y}.'),
    'capital': Facts(
        'capitals',
        _table('France: Paris, Italy: Rome, Spain: Madrid, Japan: Tokyo, Egypt: Cairo, '
               'Greece: Athens, Norway: Oslo, Peru: Lima, Cuba: Havana, Kenya: Nairobi'),
        ('What is the capital of {x}?', 'Tell me the capital of {x}.',
         'Which city is the capital of {x}?', 'Name the capital of {x}.'),
        'The capital of {x} is {y}.'),
    'day': Facts(
        'days',
        dict(zip(_DAYS, (*_DAYS[1:], _DAYS[0]), strict=True)),
        ('Which day comes after {x}?', 'What is the day after {x}?',
         'Tell me the day that follows {x}.', 'Which day follows {x}?'),
        'The day after {x} is {y}.'),
    'sum': Facts(
        'sums',
        {f'{a} and {b}': NUMBERS[i + j + 1]
         for i, a in enumerate(NUMBERS[:5]) for j, b in enumerate(NUMBERS[:5])},
        ('What is the sum of {x}?', 'Tell me the sum of {x}.', 'How much is the sum of {x}?',
         'Add up {x}.'),
        'The sum of {x} is {y}.'),
}
