"""The lists that tool problems draw from: names, places and small dictionaries."""

from __future__ import annotations

CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Dublin", "Lisbon", "Athens", "Prague", "Warsaw",
    "Budapest", "Helsinki", "Stockholm", "Copenhagen", "Amsterdam", "Brussels", "Zurich", "Geneva", "Milan", "Munich",
    "Hamburg", "Lyon", "Barcelona", "Tokyo", "Beijing", "Shanghai", "Hangzhou", "Seoul", "Singapore", "Mumbai", "Delhi",
    "Sydney", "Cairo", "Nairobi", "Boston", "Chicago", "Toronto", "Lima",
)  # fmt: skip
CURRENCIES = {
    "EUR": "euros", "USD": "dollars", "GBP": "pounds", "JPY": "yen", "CNY": "yuan", "CHF": "francs", "INR": "rupees",
    "KRW": "won", "SEK": "kronor", "BRL": "reais", "MXN": "pesos", "PLN": "zloty",
}  # fmt: skip
COMPANIES = (
    "Apple", "Google", "Amazon", "Microsoft", "Nvidia", "Intel", "Samsung", "Sony", "Siemens", "Toyota", "Volvo",
    "Airbus", "Boeing", "Nestle", "Alibaba", "Tencent", "Netflix", "Oracle", "Adobe", "Philips",
)  # fmt: skip
CUISINES = (
    "Italian", "French", "Indian", "Chinese", "Thai", "Greek", "Mexican", "Japanese", "Korean", "Turkish", "Spanish",
    "Lebanese",
)  # fmt: skip
RESTAURANTS = (
    "Luna", "Olive", "Saffron", "Bella", "Lotus", "Garden", "Harbor", "Maple", "Basil", "Coral", "Ember", "Juniper",
    "Pearl", "Sage", "Terra", "Willow",
)  # fmt: skip
GENRES = ("jazz", "rock", "blues", "classical", "pop", "folk", "soul", "reggae", "techno", "disco", "opera", "metal")
CONDITIONS = ("sunny", "cloudy", "rainy", "snowy", "windy", "foggy", "stormy", "clear")
TASKS = (
    "call mom", "buy milk", "water the plants", "pay the rent", "walk the dog", "send the report", "book a table",
    "clean the kitchen", "read a book", "feed the cat", "take a break", "wash the car", "do the laundry",
    "go for a run",
    "check the oven", "charge the phone",
)  # fmt: skip
DEFINITIONS = {
    "river": "a large stream of water", "forest": "a place full of trees", "island": "land with water all around",
    "desert": "a dry place with little rain", "castle": "a strong old building", "bridge": "a way over a river",
    "garden": "a place where plants grow", "market": "a place to buy and sell", "engine": "a machine that makes power",
    "library": "a place full of books", "planet": "a large body in space", "comet": "a body of ice in space",
    "mirror": "a glass that shows you", "candle": "a stick of wax with light", "hammer": "a tool to hit nails",
    "anchor": "a weight that holds a ship", "valley": "low land between hills", "harbor": "a safe place for ships",
    "pillow": "a soft rest for the head", "rocket": "a machine that flies to space", "violin": "a small music tool",
    "wallet": "a small case for money", "orchard": "a place with fruit trees", "tunnel": "a way under the ground",
}  # fmt: skip
TRANSLATIONS = {
    "French": {"house": "maison", "water": "eau", "bread": "pain", "book": "livre", "dog": "chien", "cat": "chat",
               "sun": "soleil", "moon": "lune", "milk": "lait", "friend": "ami", "night": "nuit", "tree": "arbre"},
    "Spanish": {"house": "casa", "water": "agua", "bread": "pan", "book": "libro", "dog": "perro", "cat": "gato",
                "sun": "sol", "moon": "luna", "milk": "leche", "friend": "amigo", "night": "noche", "tree": "arbol"},
    "German": {"house": "Haus", "water": "Wasser", "bread": "Brot", "book": "Buch", "dog": "Hund", "cat": "Katze",
               "sun": "Sonne", "moon": "Mond", "milk": "Milch", "friend": "Freund", "night": "Nacht", "tree": "Baum"},
    "Italian": {"house": "casa", "water": "acqua", "bread": "pane", "book": "libro", "dog": "cane", "cat": "gatto",
                "sun": "sole", "moon": "luna", "milk": "latte", "friend": "amico", "night": "notte", "tree": "albero"},
}  # fmt: skip
WORDS = (*DEFINITIONS, *TRANSLATIONS["French"])
"""For both dictionaries: a word that is held out with the one is known from the other."""
