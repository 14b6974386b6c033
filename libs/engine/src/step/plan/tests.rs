use super::*;

fn run(row: usize, rows: usize, position: usize) -> Run {
    Run {
        sequence: 0,
        row,
        rows,
        position,
    }
}

#[test]
fn runs_are_cut_at_block_boundaries() {
    let pieces: Vec<Run> = run(5, 40, 30).split(16, 30 % 16).collect();
    assert_eq!(
        pieces,
        [run(5, 2, 30), run(7, 16, 32), run(23, 16, 48), run(39, 6, 64)]
    );
    let pieces: Vec<Run> = run(0, 32, 32).split(16, 0).collect();
    assert_eq!(pieces, [run(0, 16, 32), run(16, 16, 48)]);
    let pieces: Vec<Run> = run(0, 1, 47).split(16, 15).collect();
    assert_eq!(pieces, [run(0, 1, 47)]);
}
