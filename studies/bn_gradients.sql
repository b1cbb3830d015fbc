-- Queries of studies/bn_gradients.py. Three tables are not the store's: `plan` has one row per trial of the preset; `chosen`
-- one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that selects from
-- another of this file gets it as a CTE. A loss that left the float32 numbers is +inf in the store, and no loss falls to it.

-- name: networks
-- One row per trial of plain gradient descent on all parameters, with batch norm after every layer or none: `title` is its
-- network in words. A network, initialisation, norm and rate with several trials a seed, because another field was given
-- several values, is left out: these are no repeats.
select
    trial,
    seed,
    network,
    if(network = 'resnet', 'ResNet-', 'VGG-') || depth as title,
    weight_init,
    norm,
    lr,
    steps,
    outcome
from chosen
join trials using (trial)
where
    network in ('resnet', 'vgg')
    and norm in ('batch', 'none')
    and placement in ('every', 'none')
    and affine = 'both'
    and affine_at = placement
    and trainable = 'all'
    and momentum = 0
    and weight_decay = 0
    and coalesce(norm_decay, 0) = 0
    and gamma_l1 + gamma_l2 + beta_l1 + beta_l2 = 0
    and warmup = 0
    and len(milestones) = 0
    and plateau is null
qualify count(*) over (partition by network, weight_init, norm, lr, seed) = 1
order by network, weight_init, norm, lr, seed

-- --- Section 1: the formulas -----------------------------------------------------------------------------------------

-- name: formulas
-- One row per formula and statistics (training: those of the images; constant: the same, held constant): the greatest error
-- over networks, layers, steps and numbers of images.
with
-- one row per reading, formula and statistics
readings as (
    select trial, 'g_gamma' as formula, 'training' as statistics, gamma_error as error from norm_gradient
    union all
    select trial, 'g_beta', 'training', beta_error from norm_gradient
    union all
    select trial, 'g_z and both terms', 'training', residual from norm_gradient
    union all
    select trial, 'g_gamma', 'constant', constant_gamma_error from norm_gradient
    union all
    select trial, 'g_beta', 'constant', constant_beta_error from norm_gradient
    union all
    select trial, 'g_z', 'constant', constant_input_error from norm_gradient
)

select
    formula,
    statistics,
    max(error) as measured,
    count(distinct seed) as n
from readings
join networks using (trial)
where error is not null
group by formula, statistics
order by statistics desc, formula

-- name: errors
-- One row per trial with batch norm, step, norm layer, number of images and place: the error of g_z at the norm's input, what
-- it makes of the gradient of the weights before the norm, and its error at the input where every later norm has it too.
with
-- one row per trial, step, norm layer, number of images and place
readings as (
    select trial, step, layer, layer_index, images, 'norm' as place, input_error as error from norm_gradient
    union all
    select trial, step, layer, layer_index, images, 'weights', weight_error from norm_gradient
    union all
    select trial, step, layer, layer_index, images, 'every norm', compound_error from norm_gradient
)

select
    trial,
    seed,
    title,
    weight_init,
    step,
    layer,
    layer_index,
    images,
    if(images = max(images) over (partition by trial), 'whole batch', images || ' images') as size,
    place,
    error
from readings
join networks using (trial)
where error is not null

-- name: errors_in_training
-- One row per place and size: the median error over layers, steps and networks, mean over seeds with its 95 % interval.
with
-- one row per place, size and seed
by_seed as (
    select place, size, seed, median(error) as x
    from errors
    group by place, size, seed
),

-- one row per place and size
over_seeds as (
    select place, size, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by place, size
)

select place, size, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by place, size

-- name: error_by_size
-- One row per network from He's weights, number of images and place: median error over layers, steps and seeds, with the
-- middle 80 %.
select
    title as panel,
    images,
    place,
    median(error) as error,
    quantile_cont(error, 0.1) as low,
    quantile_cont(error, 0.9) as high
from errors
where weight_init = 'he_normal'
group by title, images, place
order by title, place, images

-- name: error_by_position
-- One row per network from He's weights, place (at the norm, at the weights), layer and size: median error over steps and
-- seeds, a shortcut's norm counted to the layer beside it.
select
    title || if(place = 'norm', ', at the norm', ', at the weights') as panel,
    layer_index,
    size,
    median(error) as error
from errors
where weight_init = 'he_normal' and place in ('norm', 'weights') and size in ('2 images', '8 images', 'whole batch')
group by title, place, layer_index, size
order by title, place, size, layer_index

-- name: missing_terms
-- One row per network from He's weights, number of images and term: its share of the length of the note's g_z, median.
with
-- one row per reading and term
readings as (
    select trial, images, 'mean' as term, ones_part as part from norm_gradient
    union all
    select trial, images, 'variance', values_part from norm_gradient
)

select title as panel, images, term, median(part) as part
from readings
join networks using (trial)
where weight_init = 'he_normal'
group by title, images, term
order by title, term, images

-- name: radial_part
-- One row per network from He's weights, number of images and gradient: the radial part of the weights' gradient, median.
with
-- one row per reading and gradient
readings as (
    select trial, images, 'note' as gradient, weight_radial as radial from norm_gradient
    union all
    select trial, images, 'true', true_radial from norm_gradient
)

select title as panel, images, readings.gradient, median(radial) as radial
from readings
join networks using (trial)
where weight_init = 'he_normal'
group by title, images, readings.gradient
order by title, readings.gradient, images

-- --- Section 2: the series and the condition ---------------------------------------------------------------------------

-- name: lengths
-- One row per trial from He's weights, step and step size: whether the quadratic term is the smaller (`holds`), whether the
-- loss of the batch falls (`falls`), whether it is the length of the trial's own updates (`own`), and whether what the series
-- says is more than rounding (`seen`).
select
    trial,
    seed,
    network,
    title,
    norm,
    lr,
    descent.step,
    length,
    largest,
    first_order,
    second_order,
    second_order / first_order as ratio,
    abs(multiple - 1) < 1e-6 as own,
    second_order < first_order as holds,
    loss < loss_before as falls,
    abs(first_order - second_order) > 1e-5 * loss_before as seen
from descent
join networks using (trial)
where weight_init = 'he_normal' and first_order > 0

-- name: condition_holds
-- One row per network and norm: the share of steps, at the trials' own rates, whose quadratic term is the smaller; every trial
-- counts the same, mean over seeds with its 95 % interval.
with
-- one row per trial
by_trial as (
    select network, norm, seed, trial, avg(holds::int) as x
    from lengths
    where own
    group by network, norm, seed, trial
),

-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, avg(x) as x
    from by_trial
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: falls_at_worst
-- One row per network and norm: the share of steps at the trials' own rate that lower the loss of their batch, at the rate with
-- the fewest; mean over seeds with its 95 % interval.
with
-- one row per network, norm, rate and seed
by_rate as (
    select network, norm, lr, seed, avg(falls::int) as x
    from lengths
    where own
    group by network, norm, lr, seed
),

-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, min(x) as x
    from by_rate
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: what_the_condition_says
-- One row per norm and condition (holds, fails): the share of step sizes at which the loss does what the note says, falls or
-- does not; over networks, rates, steps and step sizes, mean over seeds with its 95 % interval.
with
-- one row per norm, condition and seed
by_seed as (
    select
        norm,
        if(holds, 'holds', 'fails') as condition,
        seed,
        avg((falls = holds)::int) as x
    from lengths
    where seen
    group by norm, condition, seed
),

-- one row per norm and condition
over_seeds as (
    select norm, condition, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by norm, condition
)

select
    norm,
    condition,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by norm, condition desc

-- name: no_direction_of_descent
-- One row: of the steps whose quadratic term is the greater at the trial's own rate, the share at which no step of less than a
-- tenth of the length where both are equal lowers the loss; mean over seeds with its 95 % interval.
with
-- one row per trial and step where one so short was looked at, and its change is more than rounding
by_step as (
    select seed, trial, step, not bool_or(falls) filter (where length < largest / 10) as none_falls
    from lengths
    group by seed, trial, step
    having bool_or(own and not holds) and count(*) filter (where length < largest / 10 and seen) > 0
),

-- one row per seed
by_seed as (
    select seed, avg(none_falls::int) as x
    from by_step
    group by seed
),

-- one row
over_seeds as (
    select avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
)

select mean as measured, n, greatest(0, mean - t95 * error) as low, least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)

-- name: condition_over_training
-- One row per network, rate, norm and step: quadratic over first-order term at the trials' own rate, geometric mean over the
-- seeds where it is above 0, with their range.
select
    title || ', rate ' || format('{:g}', lr) as panel,
    norm,
    step,
    exp(avg(ln(ratio))) as ratio,
    min(ratio) as low,
    max(ratio) as high
from lengths
where own and ratio > 0 and isfinite(ratio)
group by title, lr, norm, step
order by title, lr, norm, step

-- name: longest_step
-- One row per network, norm, rate and step: the length at which both terms are equal, geometric mean over the seeds that have
-- one.
select
    title || if(norm = 'batch', ', batch norm', ', no norm') as panel,
    lr,
    step,
    exp(avg(ln(largest))) as longest
from lengths
where own and largest > 0
group by title, norm, lr, step
order by title, norm, lr, step

-- name: falls_by_ratio
-- One row per network, norm and half decade of quadratic over first-order term: the share of steps that lower the loss, of ten
-- at least.
select
    title as panel,
    norm,
    power(10, round(2 * log10(ratio)) / 2) as ratio,
    avg(falls::int) as falls,
    count(*) as n
from lengths
where seen and lengths.ratio > 0 and lengths.ratio between 1e-4 and 1e6
group by title, norm, round(2 * log10(lengths.ratio))
having count(*) >= 10
order by title, norm, round(2 * log10(lengths.ratio))

-- --- Section 2: what batch norm lets a rate be -------------------------------------------------------------------------

-- name: endings
-- One row per trial from He's weights: the share of training images right at its end, 0 where it diverged.
select
    trial,
    seed,
    network,
    title,
    norm,
    lr,
    if(outcome = 'diverged', 0.0, reading.accuracy) as accuracy
from networks
left join (select trial, step as steps, accuracy from curve where split = 'train') as reading using (trial, steps)
where weight_init = 'he_normal' and (outcome = 'diverged' or reading.accuracy is not null)

-- name: accuracy_over_rates
-- One row per network, norm and rate: accuracy on training images at the end, mean over seeds with their range.
select
    title as panel,
    norm,
    lr,
    avg(accuracy) as accuracy,
    min(accuracy) as low,
    max(accuracy) as high
from endings
group by title, norm, lr
order by title, norm, lr

-- name: rates_that_train
-- One row per network and norm: the share of rates at which half of the training images are right at the end, mean over seeds
-- with its 95 % interval.
with
-- one row per network, norm and seed
by_seed as (
    select network, norm, seed, avg((accuracy >= 0.5)::int) as x
    from endings
    group by network, norm, seed
),

-- one row per network and norm
over_seeds as (
    select network, norm, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, norm
)

select
    network,
    norm,
    mean as measured,
    n,
    greatest(0, mean - t95 * error) as low,
    least(1, mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network, norm

-- name: larger_rate
-- One row per network: the largest rate that trains with batch norm over that without, geometric mean over the seeds that have
-- both, with its 95 % interval.
with
-- one row per network and seed
by_seed as (
    select
        network,
        seed,
        ln(max(lr) filter (where norm = 'batch')) - ln(max(lr) filter (where norm = 'none')) as x
    from endings
    where accuracy >= 0.5
    group by network, seed
),

-- one row per network
over_seeds as (
    select network, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network
)

select network, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network

-- name: longer_steps
-- One row per network: the length at which both terms are equal before the first update, with batch norm over without,
-- geometric mean over the seeds that have both, with its 95 % interval.
with
-- one row per network and seed; trials of other rates start alike
by_seed as (
    select
        network,
        seed,
        ln(any_value(largest) filter (where norm = 'batch')) - ln(any_value(largest) filter (where norm = 'none')) as x
    from lengths
    where step = 0 and largest > 0
    group by network, seed
),

-- one row per network
over_seeds as (
    select network, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network
)

select network, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by network

-- --- Section 2: how the terms scale ------------------------------------------------------------------------------------

-- name: scaled
-- One row per trial, set of parameters, factor of the weights before norms and reading: the reading's logarithm, from the
-- magnitude where d'Hd is negative.
with
-- one row per trial, set of parameters and factor
terms as (
    select trial, parameters, factor, sigma, ln(gradient_square) as first_order, ln(abs(quadratic)) as second_order
    from weight_scaling
    where gradient_square > 0 and quadratic != 0
),

-- one row per trial, set of parameters, factor and reading
readings as (
    select trial, parameters, factor, sigma, 'gradient' as reading, first_order / 2 as x from terms
    union all
    select trial, parameters, factor, sigma, 'hessian', second_order - first_order from terms
    union all
    select trial, parameters, factor, sigma, 'first order', first_order from terms
    union all
    select trial, parameters, factor, sigma, 'second order', second_order from terms
)

select seed, title, weight_init, readings.*
from readings
join networks using (trial)

-- name: exponents
-- One row per set of parameters and reading: its exponent in sigma between factors 1 and 100, mean over the networks of a seed,
-- and over seeds with its 95 % interval.
with
-- one row per trial, set of parameters and reading
by_trial as (
    select trial, seed, parameters, reading, regr_slope(x, ln(sigma)) as exponent
    from scaled
    where factor >= 1
    group by all
),

-- one row per set of parameters, reading and seed
by_seed as (
    select parameters, reading, seed, avg(exponent) as x
    from by_trial
    group by parameters, reading, seed
),

-- one row per set of parameters and reading
over_seeds as (
    select parameters, reading, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by parameters, reading
)

select parameters, reading, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by parameters desc, reading

-- name: exponent_below_epsilon
-- One row: the exponent of the first-order term of the weights before norms in their factor, from 0.001 to 0.01; mean over the
-- networks of a seed, and over seeds with its 95 % interval.
with
-- one row per seed
by_seed as (
    select seed, avg(exponent) as x
    from (
        select seed, trial, regr_slope(x, ln(factor)) as exponent
        from scaled
        where parameters = 'weights' and reading = 'first order' and factor between 0.0009 and 0.011
        group by seed, trial
    ) as by_trial
    group by seed
),

-- one row
over_seeds as (
    select avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
)

select mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)

-- name: terms_over_sigma
-- One row per network from He's weights, set of parameters, factor and term: the term over its value at factor 1, geometric
-- mean over seeds, with the geometric mean of sigma.
with
-- one row per trial, set of parameters, factor and term
relative as (
    select
        title,
        parameters,
        factor,
        sigma,
        reading,
        x - any_value(x) filter (where factor = 1) over (partition by trial, parameters, reading) as x
    from scaled
    where weight_init = 'he_normal' and reading in ('first order', 'second order')
)

select
    title || if(parameters = 'weights', ', weights before norms', ', all that trains') as panel,
    reading as term,
    exp(avg(ln(sigma))) as sigma,
    exp(avg(x)) as relative
from relative
group by title, parameters, factor, reading
order by title, parameters desc, reading, factor

-- --- Section 2: gamma --------------------------------------------------------------------------------------------------

-- name: gamma_exponents
-- One row per network from He's weights and set of gammas: the exponent of the stem's gradient in them, between a tenth of them
-- and all, over the number of norms from the stem to the output; mean over seeds with its 95 % interval.
with
-- one row per network, set and seed
by_seed as (
    select network, gammas, seed, regr_slope(ln(gradient), ln(factor)) / any_value(norms_behind) as x
    from gamma_scaling
    join networks using (trial)
    where weight_init = 'he_normal' and layer_index = 1 and factor between 0.09 and 1 and gradient > 0
    group by network, gammas, seed
),

-- one row per network and set
over_seeds as (
    select network, gammas, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by network, gammas
)

select network, gammas, mean as measured, n, mean - t95 * error as low, mean + t95 * error as high
from over_seeds
left join student using (n)
order by network, gammas

-- name: gradients_by_gamma
-- One row per network from He's weights, set of gammas, factor and layer: length of the gradient, geometric mean over seeds.
select
    title || case gammas
        when 'every' then ', every gamma'
        when 'inner' then ', all but the last'
        else ', in branches'
    end as panel,
    layer_index,
    factor,
    exp(avg(ln(gradient))) as gradient
from gamma_scaling
join networks using (trial)
where weight_init = 'he_normal' and gradient > 0 and factor in (0.01, 0.1, 1, 10)
group by title, gammas, factor, layer_index
order by title, gammas != 'every', gammas != 'inner', factor, layer_index

-- name: gradients
-- One row per trial, layer and kind: length of the gradient of the weights before the first update, without norms, with batch
-- norm, and with a tenth of all its gammas but the last.
with
-- one row per trial, layer and kind
readings as (
    select trial, layer_index, 'none' as kind, rms * sqrt(weights) as gradient from gradient
    union all
    select trial, layer_index, 'batch', gradient from gamma_scaling where gammas = 'every' and factor = 1
    union all
    select trial, layer_index, 'small', gradient from gamma_scaling where gammas = 'inner' and abs(factor - 0.1) < 1e-6
)

select seed, network, title, weight_init, readings.*
from readings
join networks using (trial)
where readings.gradient > 0

-- name: vanishing_gradients
-- One row per network, initialisation, kind and layer: length of the gradient, geometric mean over seeds.
select
    title || if(weight_init = 'he_normal', ', He', ', Glorot') as panel,
    kind,
    layer_index,
    exp(avg(ln(gradients.gradient))) as gradient
from gradients
group by title, weight_init, kind, layer_index
order by title, weight_init, kind, layer_index

-- name: times_the_gradient
-- One row per initialisation of the VGG: the stem's gradient with batch norm over that without, geometric mean over seeds with
-- its 95 % interval.
with
-- one row per initialisation and seed
by_seed as (
    select
        weight_init,
        seed,
        ln(max(gradient) filter (where kind = 'batch')) - ln(max(gradient) filter (where kind = 'none')) as x
    from gradients
    where network = 'vgg' and layer_index = 1
    group by weight_init, seed
),

-- one row per initialisation
over_seeds as (
    select weight_init, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by weight_init
)

select weight_init, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by weight_init

-- name: growth_of_gammas
-- One row: median |gamma| at the end over that at the start, mean over layers, of trainings from He's weights at rate 0.1;
-- geometric mean over the networks of a seed, and over seeds with its 95 % interval.
with
-- one row per trial
by_trial as (
    select
        trial,
        seed,
        avg(gamma_q50) filter (where gamma.step = steps) / avg(gamma_q50) filter (where gamma.step = 0) as growth
    from gamma
    join networks using (trial)
    where weight_init = 'he_normal' and abs(lr - 0.1) < 1e-9 and outcome = 'finished' and steps > 0
    group by trial, seed
),

-- one row per seed
by_seed as (
    select seed, avg(ln(growth)) as x
    from by_trial
    where growth > 0
    group by seed
),

-- one row
over_seeds as (
    select avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
)

select exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
