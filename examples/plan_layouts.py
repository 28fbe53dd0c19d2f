"""Compare the layouts of DeepSeek-V3 on eight H20, and see what the cheapest one does. Needs no torch and no GPU."""

from narrows import plan_step


def main() -> None:
    report = plan_step("deepseek-v3", device="h20", dp=2, tp=4, rows=16384)
    print(f"{report.deployment.config.name} on {report.deployment.mesh}, {report.shape.rows.total} rows")
    for entry in report.entries:
        communication = 1e3 * entry.plan.totals()["communication"]
        print(
            f"  {entry.plan.layout_name:24} {1e3 * entry.plan.seconds:7.1f} ms, of which {communication:5.1f} ms "
            f"communication; {entry.memory.weights / 1e9:.0f} GB of weights per rank"
        )
    print("Why auto:")
    for reason in report.why:
        print(f"  {reason}")
    print("When another layout is the cheapest of the named ones:")
    for found in report.best_named:
        print(f"  {found.first:6} to {found.last:6} rows: {found.best}")


if __name__ == "__main__":
    main()
