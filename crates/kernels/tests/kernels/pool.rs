//! Tests of the thread pool.

use candle_llama_kernels::{Cancel, Pool};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[test]
fn the_pool_runs_every_task_once_for_any_caller() {
    let pool = Pool::new(3).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for tasks in [0, 1, 2, 7, 100] {
                    for _ in 0..50 {
                        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        pool.run(tasks, &Cancel::never(), &|task| {
                            counts[task].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                    }
                }
            });
        }
    });
}

#[test]
fn tasks_of_a_busy_thread_are_run_by_the_others() {
    let pool = Pool::new(2).unwrap();
    let done = AtomicUsize::new(0);
    // The caller's first task ends only when all other tasks are done, including those that the caller would
    // run next.
    pool.run(100, &Cancel::never(), &|task| {
        let started = Instant::now();
        while task == 0 && done.load(Ordering::SeqCst) < 99 {
            assert!(started.elapsed() < Duration::from_secs(60), "no other thread runs these tasks");
            std::thread::yield_now();
        }
        done.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(done.into_inner(), 100);
}

#[test]
fn no_worker_runs_a_job_that_has_returned() {
    let pool = Pool::new(4).unwrap();
    for round in 0..20_000 {
        let (is_open, done) = (AtomicBool::new(true), AtomicUsize::new(0));
        let tasks = 2 + round % 7;
        pool.run(tasks, &Cancel::never(), &|_| {
            assert!(is_open.load(Ordering::SeqCst));
            done.fetch_add(1, Ordering::SeqCst);
        });
        is_open.store(false, Ordering::SeqCst);
        assert_eq!(done.load(Ordering::SeqCst), tasks);
    }
}

#[test]
fn ranges_cover_every_length_once() {
    let pool = Pool::new(3).unwrap();
    for (lens, step) in [(&[][..], 1), (&[0, 7, 0, 1, 12], 5), (&[1, 1, 1], 64), (&[300], 7)] {
        let seen: Vec<Vec<AtomicUsize>> =
            lens.iter().map(|&len| (0..len).map(|_| AtomicUsize::new(0)).collect()).collect();
        pool.for_each_range(lens, step, &Cancel::never(), &|index, range| {
            assert!(range.len() <= step && range.start.is_multiple_of(step));
            seen[index][range].iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
        });
        assert!(seen.iter().flatten().all(|count| count.load(Ordering::Relaxed) == 1), "{lens:?} by {step}");
    }
}

#[test]
fn a_parked_pool_wakes_again() {
    let pool = Pool::new(2).unwrap();
    for _ in 0..5 {
        std::thread::sleep(std::time::Duration::from_millis(3));
        let threads = std::sync::Mutex::new(std::collections::HashSet::new());
        pool.run(200, &Cancel::never(), &|_| {
            std::thread::sleep(std::time::Duration::from_micros(20));
            threads.lock().unwrap().insert(std::thread::current().id());
        });
        assert_eq!(threads.lock().unwrap().len(), 2, "the worker took part");
    }
}

#[test]
fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(2).unwrap();
    for _ in 0..20 {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &Cancel::never(), &|task| assert!(task != 13, "unlucky"));
        }));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(64, &Cancel::never(), &|_| _ = count.fetch_add(1, Ordering::Relaxed));
        assert_eq!(count.load(Ordering::Relaxed), 64);
    }
}

#[test]
fn cancelling_leaves_the_remaining_tasks_out() {
    for threads in [1, 2] {
        let pool = Pool::new(threads).unwrap();
        let flag = AtomicBool::new(false);
        let count = AtomicUsize::new(0);
        pool.run(10_000, &Cancel::new(&flag), &|_| {
            if count.fetch_add(1, Ordering::Relaxed) == 10 {
                flag.store(true, Ordering::Relaxed);
            }
        });
        assert!(count.load(Ordering::Relaxed) < 100);

        let flag = AtomicBool::new(false);
        let polls = Cell::new(0);
        let poll = || {
            polls.set(polls.get() + 1);
            polls.get() == 2
        };
        let cancel = Cancel::with_poll(&flag, &poll);
        pool.run(10_000, &cancel, &|_| std::thread::sleep(std::time::Duration::from_millis(1)));
        assert_eq!(polls.get(), 2);
        assert!(cancel.is_cancelled());
    }
}
