-- Queries of studies/bjorck_learning_rate.py. Three tables are not the store's: `plan` has one row per trial of the
-- preset; `chosen` one row per trial with a result, with its test accuracy at the end (null where it diverged);
-- `student` the 97.5 % quantile t95 of Student's t for n readings. The learning rate is an axis here: nothing but
-- `best` and what builds on it chooses one, and that on held-out training images.

-- name: planned
-- One row per trial of the preset, run or not: its batch size and rate, and as `kind` its norm and, unless that stands
-- after every layer, where it stands. Where another axis gives a norm several settings, `kind` names the setting too:
-- settings are never taken for seeds, and the claims, which are about norms, find no such kind.
with
-- one row per trial: its axes, and as `others` those that this study does not name
axes as (
    select
        trial,
        regexp_extract(cell, '(^| )norm=(\S+)', 2) as norm,
        regexp_extract(cell, '(^| )placement=(\S+)', 2) as placement,
        try_cast(regexp_extract(cell, '(^| )batch=(\S+)', 2) as bigint) as batch,
        try_cast(regexp_extract(cell, '(^| )lr=(\S+)', 2) as double) as lr,
        trim(regexp_replace(cell, '(^| )(norm|placement|batch|lr)=\S+', '', 'g')) as others
    from plan
),

-- one row per trial
placed as (
    select
        *,
        case when placement in ('every', 'none') then norm else norm || ' at ' || placement end as norm_at
    from axes
)

select
    trial,
    norm_at,
    case
        when min(others) over (partition by norm_at) = max(others) over (partition by norm_at) then norm_at
        else norm_at || ', ' || others
    end as kind,
    batch,
    lr
from placed

-- name: trained
-- One row per trial with a result. A trial trains if it finished, its loss on training images is below the first, and
-- it has at least twice as many of them right as chance. The loss is asked for, too, because a large rate can leave
-- many images right and the loss, which is what training lowers, above its start: such a trial has not diverged, and
-- has not trained either.
with
-- one row per trial: where its curve on unaugmented images begins and ends
ends as (
    select
        trial,
        arg_min_null(loss, step) filter (where split = 'train') as first_loss,
        arg_max_null(loss, step) filter (where split = 'train') as last_loss,
        arg_max_null(accuracy, step) filter (where split = 'train') as train,
        arg_max_null(accuracy, step) filter (where split = 'validation') as held_out
    from curve
    where trial in (select trial from chosen)
    group by trial
)

select
    trial,
    norm_at,
    kind,
    planned.batch,
    planned.lr,
    seed,
    epochs,
    outcome,
    case when outcome = 'finished' then train end as train,
    case when outcome = 'finished' then held_out end as held_out,
    chosen.accuracy as test,
    coalesce(
        outcome = 'finished'
        and last_loss < first_loss
        and train >= 2 * case data when 'cifar100' then 0.01 else 0.1 end,
        false
    ) as trains
from chosen
join planned using (trial)
join trials using (trial)
left join ends using (trial)

-- name: compared_size
-- One row: the batch size at which the norms are compared, of the plan and not of what has been run so far: the one
-- with most norms, then most trials.
with
-- one row per batch size
sizes as (
    select batch, count(distinct kind) as kinds, count(*) as trials
    from planned
    group by batch
)

select first(batch order by kinds desc, trials desc, batch) as batch
from sizes

-- name: compared
-- One row per trial with a result at the batch size at which the norms are compared.
select *
from trained
where batch = (select batch from compared_size)

-- name: complete
-- One row per trial of the seeds that have a result at every rate planned for their kind and batch size; `top` is the
-- largest of these rates. A seed that lacks a result is left out: its best or its largest rate may be the one.
with
-- one row per kind and batch size
ladders as (
    select kind, batch, count(distinct lr) as rates, max(lr) as top
    from planned
    group by kind, batch
)

select trained.*, top
from trained
join ladders using (kind, batch)
qualify count(*) over (partition by kind, batch, seed) = rates

-- name: by_rate
-- One row per kind and rate at the batch size at which the norms are compared: test accuracy over seeds.
select
    kind,
    lr,
    count(*) as results,
    count(*) filter (where outcome = 'diverged') as diverged,
    avg(held_out) as held_out,
    count(test) as n,
    avg(test) as test,
    var_samp(test) / count(test) as squared_error
from complete
where batch = (select batch from compared_size)
group by kind, lr

-- name: best
-- One row per kind: the rate that is best on held-out training images. A rate at which no seed diverged comes first.
-- Without held-out images there is no row: test images choose nothing.
select *
from by_rate
where held_out is not null
qualify row_number() over (partition by kind order by diverged = 0 desc, held_out desc, lr) = 1

-- name: largest_by_seed
-- One row per kind and seed: decimal logarithm of the largest rate at which it trains, NULL where none of the rates
-- tried does: such a seed has no largest rate. `at_top`: it trains at the largest rate tried, and nobody looked beyond.
select
    kind,
    seed,
    max(log10(lr)) filter (where trains) as largest,
    bool_or(trains and lr = top) as at_top
from complete
where batch = (select batch from compared_size)
group by kind, seed

-- name: shown
-- One row per trial of the training curves: the paper's four, and batch normalization and none at the rates that are
-- best for one of them. `line` names norm and rate.
select
    trial,
    case kind when 'batch' then 'BN ' else 'no norm ' end || format('{:g}', lr) as line
from compared
where
    (kind, lr) in (('batch', 0.1), ('batch', 0.003), ('batch', 0.0001), ('none', 0.0001))
    or (kind in ('batch', 'none') and lr = (select lr from best where kind = 'none'))
    or (kind = 'batch' and lr = (select lr from best where kind = 'batch'))

-- name: test_over_training
-- One row per line of Fig. 1 and share of training: test accuracy over seeds with its 95 % interval.
with
-- one row per line and reading
over_seeds as (
    select
        line,
        coalesce(epoch / epochs, curve.step / steps) as share,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from curve
    join shown using (trial)
    join trials using (trial)
    where split = 'test'
    group by line, share
)

select line, share, n, accuracy, accuracy - t95 * error as low, accuracy + t95 * error as high
from over_seeds
left join student using (n)
order by line, share

-- name: train_over_training
-- One row per line of Fig. 1 and share of training: accuracy on unaugmented training images over seeds with its 95 %
-- interval.
with
-- one row per line and reading
over_seeds as (
    select
        line,
        coalesce(epoch / epochs, curve.step / steps) as share,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from curve
    join shown using (trial)
    join trials using (trial)
    where split = 'train'
    group by line, share
)

select line, share, n, accuracy, accuracy - t95 * error as low, accuracy + t95 * error as high
from over_seeds
left join student using (n)
order by line, share

-- name: accuracy_over_rate
-- One row per kind and rate: test accuracy over seeds with its 95 % interval, and the shares of the trials that
-- diverged and that did not train.
with
-- one row per kind and rate
over_seeds as (
    select
        kind,
        lr,
        count(test) as n,
        avg(test) as accuracy,
        stddev_samp(test) / sqrt(count(test)) as error,
        count(*) filter (where outcome = 'diverged') / count(*) as diverged,
        count(*) filter (where not trains) / count(*) as untrained
    from compared
    group by kind, lr
)

select
    kind,
    lr,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high,
    diverged,
    untrained
from over_seeds
left join student using (n)
order by kind, lr

-- name: largest_rate
-- One row per kind: decimal logarithm of the largest rate at which it trains, over the n seeds that have one, with
-- its 95 % interval. `not_found`: seeds that train at none of the rates tried. `at_top`: seeds that train at the
-- largest rate tried, whose logarithm is `tried`; where there is one, `largest` is a lower bound.
with
-- one row per kind
over_seeds as (
    select
        kind,
        count(largest) as n,
        count(*) - count(largest) as not_found,
        count(*) filter (where at_top) as at_top,
        avg(largest) as largest,
        stddev_samp(largest) / sqrt(count(largest)) as error
    from largest_by_seed
    group by kind
),

-- one row per kind
tops as (
    select kind, log10(max(lr)) as tried
    from planned
    where batch = (select batch from compared_size)
    group by kind
)

select
    kind,
    n,
    not_found,
    at_top,
    largest,
    largest - t95 * error as low,
    largest + t95 * error as high,
    pow(10, largest) as rate,
    pow(10, largest - t95 * error) as rate_low,
    pow(10, largest + t95 * error) as rate_high,
    tried,
    (select batch from compared_size) as batch
from over_seeds
join tops using (kind)
left join student using (n)
order by largest desc nulls last, kind

-- name: accuracy_over_batch
-- One row per batch size, for batch normalization and for none: test accuracy over seeds with its 95 % interval, at the
-- rate that is best on held-out training images among the rates that every batch size was tried at.
with
-- one row per kind, batch size and rate
tried as (
    select
        kind,
        batch,
        lr,
        count(*) as results,
        count(*) filter (where outcome = 'diverged') as diverged,
        avg(held_out) as held_out,
        count(test) as n,
        avg(test) as accuracy,
        stddev_samp(test) / sqrt(count(test)) as error
    from trained
    where kind in ('batch', 'none')
    group by kind, batch, lr
),

-- one row per kind and rate that each of its batch sizes has
rates as (
    select kind, lr
    from planned
    group by kind, lr
    having
        count(distinct batch) > 1
        and count(distinct batch) = (select count(distinct batch) from planned as all_rates where kind = planned.kind)
),

-- one row per kind and batch size
picked as (
    select *
    from tried
    join rates using (kind, lr)
    qualify row_number() over (
        partition by kind, batch order by results desc, diverged = 0 desc, held_out desc nulls last, lr
    ) = 1
)

select
    kind,
    batch,
    lr,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high,
    diverged / results as diverged
from picked
left join student using (n)
where held_out is not null or diverged = results
order by kind, batch

-- name: rate_gain
-- One row per kind of norm: by how many decades the largest rate at which it trains is above that without norms, over
-- the n seeds, each with its own weights and batches, that have both, with a 95 % interval. `not_found`: seeds for
-- which one of the two trains at no rate tried. `at_top`: seeds of n that train at the largest rate tried with the
-- norm; where there is one, the gain is a lower bound. A seed that trains without norms at the largest rate tried is
-- left out: its gain could be anything.
with
-- one row per kind and seed
gains as (
    select with_norm.kind, with_norm.at_top, with_norm.largest - without.largest as gain
    from largest_by_seed as with_norm
    join largest_by_seed as without using (seed)
    where without.kind = 'none' and with_norm.kind != 'none' and not without.at_top
),

-- one row per kind
over_seeds as (
    select
        kind,
        avg(gain) as measured,
        count(gain) as n,
        count(*) - count(gain) as not_found,
        count(*) filter (where gain is not null and at_top) as at_top,
        stddev_samp(gain) / sqrt(count(gain)) as error
    from gains
    group by kind
)

select
    kind,
    measured,
    n,
    not_found,
    at_top,
    measured - t95 * error as low,
    measured + t95 * error as high
from over_seeds
left join student using (n)
order by measured desc nulls last, kind

-- name: gain_at_the_best_rate
-- One row: test accuracy with batch normalization less that without norms, each at its best rate, with a 95 % interval:
-- both errors, and Student's t of the smaller number of seeds.
with
-- one row
ends as (
    select
        normed.test - without.test as gain,
        sqrt(normed.squared_error + without.squared_error) as error,
        least(normed.n, without.n) as n
    from best as normed, best as without
    where normed.kind = 'batch' and without.kind = 'none'
)

select gain as measured, n, gain - t95 * error as low, gain + t95 * error as high
from ends
left join student using (n)

-- name: share_of_the_gain
-- One row per kind: what share of the gain of batch normalization over no norm it keeps, each at its best rate; and
-- a row for batch normalization itself at the rate that is best without norms. A gain whose 95 % interval (that of
-- `gain_at_the_best_rate`) holds zero has no shares. The 95 % interval of a share is that of a ratio of independent
-- means, to first order in their errors.
with
-- one row, where the gain is above zero: both ends of it
ends as (
    select
        normed.test as normed,
        without.test as without,
        normed.test - without.test as gain,
        normed.squared_error as normed_squared_error,
        without.squared_error as without_squared_error,
        least(normed.n, without.n) as n_ends
    from best as normed, best as without
    join student on student.n = least(normed.n, without.n)
    where
        normed.kind = 'batch'
        and without.kind = 'none'
        and gain > t95 * sqrt(normed_squared_error + without_squared_error)
),

-- one row per kind, and one of batch normalization at the rate of none
candidates as (
    select kind, lr, n, test, squared_error
    from best
    where kind not in ('batch', 'none')
    union all
    select 'batch at the rate of none', lr, n, test, squared_error
    from by_rate
    where kind = 'batch' and lr = (select lr from best where kind = 'none')
),

-- one row per candidate
shares as (
    select
        kind,
        lr,
        gain,
        (test - without) / gain as share,
        sqrt(
            squared_error + share ** 2 * normed_squared_error + (1 - share) ** 2 * without_squared_error
        ) / gain as error,
        least(n, n_ends) as n
    from candidates, ends
)

select kind, lr, gain, share as measured, n, share - t95 * error as low, share + t95 * error as high
from shares
left join student using (n)
order by measured desc nulls last, kind

-- name: shortfall
-- One row, once all four have results: of layer, group and instance norm and batch renormalization, those that train
-- at as large a rate as batch normalization, less batch normalization, in test accuracy at the best rate: the one that
-- is furthest behind. Where batch normalization trains at the largest rate tried, the end of the rates would decide who
-- trains at as large a one, and there is no number; a norm of which a seed trains at no rate does not train at as large
-- a one. n is that of all four.
with
-- one row per kind that is asked about
others as (
    select *
    from largest_rate
    where kind in ('layer', 'group', 'instance', 'renorm')
),

-- one row per kind whose rate is as large
behind as (
    select best.kind, best.test - normed.test as difference, least(best.n, normed.n) as n
    from best
    join others on others.kind = best.kind
    join largest_rate as batch on batch.kind = 'batch'
    join best as normed on normed.kind = 'batch'
    where
        batch.at_top = 0
        and batch.not_found = 0
        and others.not_found = 0
        and others.largest >= batch.largest - 1e-9
)

select
    min(difference) as measured,
    case when count(*) > 0 then least(min(n), (select min(n + not_found) from others)) else 0 end as n,
    count(*) as n_as_large
from behind
having (select count(*) from others) = 4

-- name: small_steps
-- One row: test accuracy without norms at a smaller batch and a rate no larger than is best at the compared
-- batch, the best of these on held-out images, less that of batch normalization at its best rate.
with
-- one row per batch size and rate
small as (
    select
        batch,
        lr,
        count(*) as results,
        count(*) filter (where outcome = 'diverged') as diverged,
        avg(held_out) as held_out,
        count(test) as n,
        avg(test) as test,
        var_samp(test) / count(test) as squared_error
    from complete
    where
        kind = 'none'
        and batch < (select batch from compared_size)
        and lr <= (select lr from best where kind = 'none')
    group by batch, lr
),

-- one row: the best of them
picked as (
    select *
    from small
    where held_out is not null
    order by diverged = 0 desc, held_out desc, batch, lr
    limit 1
),

-- one row
ends as (
    select
        small.test - normed.test as difference,
        sqrt(small.squared_error + normed.squared_error) as error,
        least(small.n, normed.n) as n
    from picked as small, best as normed
    where normed.kind = 'batch'
)

select difference as measured, n, difference - t95 * error as low, difference + t95 * error as high
from ends
left join student using (n)

-- name: on_cifar10
-- One row per trial at the paper's own size and protocol: ResNet-110 on CIFAR-10 for 165 epochs at batch 128. Trials
-- that something else tells apart, so that a kind and rate has several of one seed, are left out.
select trial, norm_at as kind, trained.lr, trained.seed, trained.epochs, trained.outcome, train, test, trains
from trained
join trials using (trial)
where
    data = 'cifar10'
    and label_noise = 0
    and augmentation = 'flip_shift'
    and validation <= 5000
    and network = 'resnet'
    and depth = 110
    and width = 1
    and weight_init = 'glorot_normal'
    and affine = 'both'
    and norm_init = 'ones'
    and trainable = 'all'
    and trained.batch = 128
    and norm_batch = 128
    and trained.epochs = 165
    and milestones = [0.5, 0.75]
    and plateau is null
    and lr_drop = 0.1
    and warmup = 0
    and momentum = 0.9
    and weight_decay = 0.0005
    and decay_on = 'all'
qualify count(*) over (partition by norm_at, trained.lr, trained.seed) = 1

-- name: accuracy_on_cifar10
-- One row per kind and rate at the paper's size: test accuracy at the end over seeds.
with
-- one row per kind and rate
over_seeds as (
    select kind, lr, avg(test) as measured, count(test) as n, stddev_samp(test) / sqrt(count(test)) as error
    from on_cifar10
    group by kind, lr
)

select kind, lr, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by kind, lr

-- name: before_the_drop_on_cifar10
-- One row per kind and rate at the paper's size: test accuracy at the last reading before the rate drops at half of the
-- training, over seeds.
with
-- one row per trial
by_trial as (
    select trial, arg_max_null(accuracy, step) as accuracy
    from curve
    join on_cifar10 using (trial)
    where split = 'test' and epoch <= 0.5 * epochs
    group by trial
),

-- one row per kind and rate
over_seeds as (
    select
        kind,
        lr,
        avg(accuracy) as measured,
        count(accuracy) as n,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from by_trial
    join on_cifar10 using (trial)
    group by kind, lr
)

select kind, lr, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by kind, lr

-- name: off_the_training_curve_on_cifar10
-- One row per line of the paper's figure 1: the largest difference, at 10, 20 and 40 % of training, between
-- the mean training accuracy and the paper's. `differs` says which way.
with
-- one row per line and share of training: read off the paper's figure
paper (kind, lr, share, accuracy) as (
    values
        ('batch', 0.1, 0.1, 0.845), ('batch', 0.1, 0.2, 0.906), ('batch', 0.1, 0.4, 0.938),
        ('batch', 0.003, 0.1, 0.983), ('batch', 0.003, 0.2, 0.994), ('batch', 0.003, 0.4, 0.997),
        ('batch', 0.0001, 0.1, 0.807), ('batch', 0.0001, 0.2, 0.919), ('batch', 0.0001, 0.4, 0.986),
        ('none', 0.0001, 0.1, 0.747), ('none', 0.0001, 0.2, 0.855), ('none', 0.0001, 0.4, 0.951)
),

-- one row per line, share and seed: the last reading before that share
readings as (
    select
        paper.kind,
        paper.lr,
        share,
        any_value(paper.accuracy) as expected,
        arg_max_null(curve.accuracy, step) as accuracy
    from paper
    join on_cifar10 on on_cifar10.kind = paper.kind and on_cifar10.lr = paper.lr
    join curve using (trial)
    where split = 'train' and epoch <= share * epochs
    group by paper.kind, paper.lr, share, trial
),

-- one row per line and share
means as (
    select kind, lr, share, avg(accuracy) - any_value(expected) as differs, count(accuracy) as n
    from readings
    group by kind, lr, share
)

select kind, lr, max(abs(differs)) as measured, arg_max(differs, abs(differs)) as differs, min(n) as n
from means
group by kind, lr
order by kind, lr

-- name: fitted_on_cifar10
-- One row: the least of the four training accuracies at the end, at the paper's size.
with
-- one row per line of the paper's figure 1
ends as (
    select avg(train) as train, count(train) as n
    from on_cifar10
    where (kind, lr) in (('batch', 0.1), ('batch', 0.003), ('batch', 0.0001), ('none', 0.0001))
    group by kind, lr
)

select min(train) as measured, min(n) as n
from ends
having count(*) = 4

-- name: lost_on_cifar10
-- One row: of the trials without norms at rates above 0.0001 at the paper's size, the share that diverged or did not
-- train, if the rates planned go up to 0.1 in steps of half a decade; n is the least number of seeds at a rate, 0 where
-- a rate has none yet.
with
-- one row per rate
rates as (
    select
        planned.lr,
        count(*) filter (where not on_cifar10.trains) as lost,
        count(on_cifar10.trial) as n
    from planned
    left join on_cifar10 using (trial)
    where planned.norm_at = 'none' and planned.batch = 128 and planned.lr > 0.0001
    group by planned.lr
)

select sum(lost) / sum(n) as measured, min(n) as n
from rates
having list_has_all(list(lr), [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1])
