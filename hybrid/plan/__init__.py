"""Before money is spent: memory, work, time and cost of a training, and whether the guide's numbers hold.

run.py       what is to be planned: model, phase, cards, batch
cards.py     what a card has
kept.py      what autograd keeps, counted by the model itself on the meta device
memory.py    bytes on each card
work.py      operations for a token, seconds for a step, hours and money for a text
fit.py       the smallest change that makes it fit
table.py     a plan as a table and as JSON
serve.py     serving in place of training: keys and values, requests that fit, the least time a token
guide.py     the training guide and its cost sheet, claim by claim
"""
