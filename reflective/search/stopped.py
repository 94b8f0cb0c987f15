"""Why each strategy stops candidates, for people: said in pages and notebooks of results as in the stream of a server."""

STOPPED = {
    "first_finish": "another had finished first",
    "prune": "it lagged too far behind the best to win any more",
    "replace": "it was among the worst, and gave way to a fork of a better one or to a shortage of tokens",
    "step_beam": "it was not among the best after a step, or enough others had finished",
    "dvts": "another of its tree scored higher after a step",
    "particles": "it was not drawn when candidates were drawn anew by their scores",
    "astar": "others were more promising, or the search had its answer",
}
