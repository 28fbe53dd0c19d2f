"""Answer the same questions on two ranks under two layouts: the answers are the same, what crosses ranks is not."""

from narrows import LLM

QUESTIONS = (
    "What is 47 + 38?",
    "Tom has 25 apples. Tom buys 17 more and gives 9 to Anna. How many apples are left?",
)


def main() -> None:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = {}
    for layout in ("auto", "attn-tp-input-scattered"):
        with LLM("narrows-demo", tp=2, layout=layout) as llm:
            answers[layout] = [completion.text for completion in llm.generate(chats, max_tokens=48)]
    assert len({tuple(texts) for texts in answers.values()}) == 1, "a layout changes no answer"
    for question, answer in zip(QUESTIONS, answers["auto"], strict=True):
        print(f"--- {question}\n{answer}")

    print("--- The last one again, as it comes")
    with LLM("narrows-demo", tp=2) as llm:
        for piece in llm.stream(chats[-1:], max_tokens=48):
            print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
