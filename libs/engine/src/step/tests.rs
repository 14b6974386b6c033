use std::collections::HashMap;
use std::time::Duration;

use super::*;
use crate::Precision;
use crate::fixture::{TinyModel, write_tiny_gguf};
use crate::monolith::OwnMemory;

const BLOCKS: usize = 8;

fn model() -> Arc<Model> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("a model file");
    Model::load(&path, Precision::Fast).expect("the model loads")
}

fn engine(model: &Arc<Model>) -> Engine {
    let layout = model.layout(16);
    let memory = Arc::new(OwnMemory::allocate(BLOCKS * layout.block_bytes()).expect("memory"));
    Engine::new(Arc::clone(model), memory, layout, NonZeroUsize::MIN).expect("an engine")
}

fn blocks(ids: &[u32]) -> Vec<BlockId> {
    ids.iter().map(|id| BlockId(*id)).collect()
}

fn sequence<'a>(tokens: &'a [Token], start: usize, blocks: &'a [BlockId]) -> SequenceStep<'a> {
    SequenceStep {
        tokens,
        start,
        blocks,
        cached_tokens: 0,
        logits: LogitsWanted::Last,
    }
}

#[test]
fn bad_steps_are_refused_by_name() {
    let model = model();
    let mut engine = engine(&model);
    let (one, two) = (blocks(&[0]), blocks(&[0, 1]));
    let vocabulary = model.config().vocabulary;
    let context_tokens_max = model.config().context_tokens_max;
    let (bad, twice) = (vocabulary as Token, blocks(&[3, 3]));
    let unknown = [bad];
    let outside = blocks(&[BLOCKS as u32]);
    let cases = [
        (vec![sequence(&[], 0, &one)], StepError::Empty { sequence: 0 }),
        (
            vec![sequence(&[1], 0, &one), sequence(&unknown, 0, &two[1..])],
            StepError::Token {
                token: bad,
                vocabulary,
            },
        ),
        (
            vec![sequence(&[1; 17], 0, &one)],
            StepError::Blocks {
                sequence: 0,
                needed: 2,
                found: 1,
            },
        ),
        (
            vec![sequence(&[1], 16, &one)],
            StepError::Blocks {
                sequence: 0,
                needed: 2,
                found: 1,
            },
        ),
        (
            vec![sequence(&[1], 0, &outside)],
            StepError::BlockId {
                block: outside[0],
                blocks: BLOCKS,
            },
        ),
        (
            vec![sequence(&[1], usize::MAX, &one)],
            StepError::Context {
                sequence: 0,
                tokens: usize::MAX,
                context_tokens_max,
            },
        ),
        (
            vec![sequence(&[1], 0, &one), sequence(&[2], 0, &one)],
            StepError::SharedWrite { block: one[0] },
        ),
        (
            vec![sequence(&[1; 20], 0, &twice)],
            StepError::SharedWrite { block: BlockId(3) },
        ),
    ];
    for (batch, expected) in cases {
        assert_eq!(
            engine.step(&batch, &mut ()).expect_err("must be refused"),
            expected
        );
    }
    assert_eq!(engine.step(&[], &mut ()).expect("an empty step").rows(), 0);
    engine
        .step(&[sequence(&[1, 2], 0, &one)], &mut ())
        .expect("the engine lives");
}

#[test]
fn too_many_rows_are_refused() {
    let model = model();
    let mut engine = engine(&model);
    let table = blocks(&[0]);
    let mut batch = vec![
        SequenceStep {
            cached_tokens: 1,
            ..sequence(&[1], 0, &table)
        };
        STEP_ROWS_MAX + 1
    ];
    let refused = engine.step(&batch, &mut ()).expect_err("must be refused");
    assert_eq!(
        refused,
        StepError::TooManyRows {
            rows: STEP_ROWS_MAX + 1
        }
    );
    batch.truncate(2);
    engine.step(&batch, &mut ()).expect("cached blocks may be shared");
}

#[test]
fn another_models_layout_is_refused() {
    let model = model();
    let expected = model.layout(16);
    let found = KvLayout {
        kv_heads: expected.kv_heads + 1,
        ..expected
    };
    let memory = Arc::new(OwnMemory::allocate(1 << 20).expect("memory"));
    let refused = Engine::new(Arc::clone(&model), memory, found, NonZeroUsize::MIN)
        .err()
        .expect("must be refused");
    assert_eq!(refused, StepError::Layout { found, expected });
    let memory = Arc::new(OwnMemory::allocate(1 << 20).expect("memory"));
    let refused = Engine::new(Arc::clone(&model), memory, model.layout(24), NonZeroUsize::MIN).err();
    assert!(matches!(refused, Some(StepError::BadLayout(_))), "{refused:?}");
}

/// Notes the order of calls, and breaks off at one of them.
struct Recorder {
    calls: Vec<(&'static str, usize)>,
    break_at: Option<(&'static str, usize)>,
}

impl Recorder {
    fn note(&mut self, call: (&'static str, usize)) -> ControlFlow<()> {
        self.calls.push(call);
        if self.break_at == Some(call) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

impl StepObserver for Recorder {
    fn before_layer(&mut self, layer: usize) -> ControlFlow<()> {
        self.note(("before", layer))
    }

    fn kv_written(&mut self, layer: usize) -> ControlFlow<()> {
        self.note(("written", layer))
    }
}

#[test]
fn the_observer_sees_each_layer_and_can_break_off() {
    let model = model();
    let mut engine = engine(&model);
    let table = blocks(&[0]);
    let batch = [sequence(&[1, 2, 3], 0, &table)];
    let mut all = Recorder {
        calls: Vec::new(),
        break_at: None,
    };
    engine.step(&batch, &mut all).expect("a step");
    assert_eq!(
        all.calls,
        [("before", 0), ("written", 0), ("before", 1), ("written", 1)]
    );
    for (at, layer) in [("before", 1), ("written", 0)] {
        let mut broken = Recorder {
            calls: Vec::new(),
            break_at: Some((at, layer)),
        };
        let error = engine.step(&batch, &mut broken).expect_err("must break off");
        assert_eq!(error, StepError::Aborted { layer });
        assert_eq!(broken.calls.last(), Some(&(at, layer)));
    }
}

/// Reads the layer's KV as it is when the engine says that it is complete.
struct Reader<'a> {
    memory: &'a OwnMemory,
    layout: KvLayout,
    layers: HashMap<usize, Vec<u8>>,
}

impl StepObserver for Reader<'_> {
    fn kv_written(&mut self, layer: usize) -> ControlFlow<()> {
        let range = self.layout.layer_range(layer);
        // SAFETY: the range is in block 0, to which nobody writes while the observer is called.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.memory.base().as_ptr().add(range.start), range.len()) };
        self.layers.insert(layer, bytes.to_vec());
        ControlFlow::Continue(())
    }
}

#[test]
fn kv_is_complete_when_the_observer_is_told() {
    let model = model();
    let layout = model.layout(16);
    let memory = Arc::new(OwnMemory::allocate(BLOCKS * layout.block_bytes()).expect("memory"));
    let threads = NonZeroUsize::new(3).expect("not zero");
    let mut engine =
        Engine::new(Arc::clone(&model), Arc::clone(&memory) as _, layout, threads).expect("an engine");
    let (table, tokens): (_, Vec<Token>) = (blocks(&[0]), (0..16).collect());
    let mut reader = Reader {
        memory: &memory,
        layout,
        layers: HashMap::new(),
    };
    engine
        .step(&[sequence(&tokens, 0, &table)], &mut reader)
        .expect("a step");
    let told: Vec<u8> = (0..layout.layers)
        .flat_map(|layer| reader.layers[&layer].clone())
        .collect();
    // SAFETY: the block is in the memory and no step runs.
    let after = unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), layout.block_bytes()) };
    assert!(told == after && after.iter().any(|byte| *byte != 0));
}

#[test]
fn cached_positions_are_not_written() {
    let model = model();
    let layout = model.layout(16);
    let memory = Arc::new(OwnMemory::allocate(BLOCKS * layout.block_bytes()).expect("memory"));
    let mut engine = Engine::new(
        Arc::clone(&model),
        Arc::clone(&memory) as _,
        layout,
        NonZeroUsize::MIN,
    )
    .expect("an engine");
    let (table, tokens): (_, Vec<Token>) = (blocks(&[0]), (0..16).collect());
    let full = engine
        .step(&[sequence(&tokens, 0, &table)], &mut ())
        .expect("a step")
        .row(0)
        .to_vec();
    let snapshot = || {
        // SAFETY: the block is in the memory and no step runs.
        unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), layout.block_bytes()) }.to_vec()
    };
    let before = snapshot();
    // Another token than was cached: its KV would differ.
    let step = SequenceStep {
        cached_tokens: 16,
        ..sequence(&[99], 15, &table)
    };
    engine.step(&[step], &mut ()).expect("a step");
    assert!(snapshot() == before);
    let step = SequenceStep {
        cached_tokens: 16,
        ..sequence(&tokens[15..], 15, &table)
    };
    let again = engine.step(&[step], &mut ()).expect("a step").row(0).to_vec();
    assert_eq!(again, full);
}

#[test]
fn a_calibration_measures_what_its_blocks_have_room_for() {
    let model = model();
    let mut engine = engine(&model);
    assert_eq!(engine.calibrate(&[]).expect("no step"), None);
    let one = engine.calibrate(&blocks(&[0])).expect("steps").expect("a block");
    let positions = |calibration: &Calibration| -> Vec<_> {
        let prompts = calibration.prompts.iter();
        prompts.map(|(positions, _)| positions.clone()).collect()
    };
    assert_eq!(positions(&one).first(), Some(&(0..16)));
    assert_eq!(one.prompts.len(), 1);
    // 8 blocks of 16 tokens.
    let all: Vec<u32> = (0..BLOCKS as u32).collect();
    let all = engine.calibrate(&blocks(&all)).expect("steps").expect("blocks");
    let room = (BLOCKS * 16).min(model.config().context_tokens_max);
    assert_eq!(positions(&all), [0..64, room - 64..room]);
    assert!(all.decode_step > Duration::ZERO && all.prompts.iter().all(|(_, took)| *took > Duration::ZERO));
}
